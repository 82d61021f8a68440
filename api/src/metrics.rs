//! What the endpoint counts.
