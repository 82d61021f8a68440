//! Real servers for tests: NATS, PostgreSQL, MariaDB, SMTP, SCIM, and our own binary as a child process. Microsoft
//! Graph, an issuer of tokens and push services, which nobody can run, have stand-ins.
//!
//! Each server has a temporary directory and a port of its own, so tests share nothing and run side by
//! side. When its value is dropped the server is stopped and its directory removed; when the test
//! process dies without dropping anything, the kernel ends the server and the next test to start sweeps up
//! the directory. Everything works as root too, where PostgreSQL runs as another user.
//!
//! Linux only: it uses `setpriv` of util-linux and `/proc`. What a test needs and does not find here
//! (databases with tables, streams, configuration files) is its own to make.

mod background;
mod child;
mod cluster;
mod graph;
mod issuer;
mod mysql;
mod nats;
mod port;
mod postgres;
mod process;
mod proxy;
mod push;
mod scim;
mod smtp;
mod tools;
mod wait;
mod workdir;

pub use cluster::NatsCluster;
pub use graph::{Graph, GraphCall, GraphFault, GraphRequest};
pub use issuer::Issuer;
pub use mysql::MySql;
pub use nats::Nats;
pub use port::free_port;
pub use postgres::Postgres;
pub use process::{Process, Stopped};
pub use proxy::{Proxy, Weather};
pub use push::{PushCall, PushRequest, PushServices};
pub use scim::Scim;
pub use smtp::{Mail, Smtp, SmtpStage};
pub use tools::{node, packages, promtool, python};
pub use wait::{Condition, eventually};
