//! `nats.conf` as it is shipped: what each role may do, and what it may not.
