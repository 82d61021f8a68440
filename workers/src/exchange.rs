//! What passed between a subscriber and us in one attempt, to be shown to whoever sets it up.

use crate::HandleError;

/// One attempt as it can be shown: lines of text, without secrets.
#[derive(Debug)]
pub struct Exchange {
    /// What went out: the request with its headers, or the command and its input.
    pub sent: Vec<String>,
    /// What came back, cut to a readable length.
    pub received: Vec<String>,
    /// What the runtime would make of it.
    pub outcome: Result<(), HandleError>,
}
