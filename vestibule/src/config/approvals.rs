//! The `[approvals]` table: how people who need an approver's yes are dealt with.

use std::time::Duration;

use vestibule_api::{ApprovalSettings, Messages, Text};

use super::{DAY, reader::Section};

/// What holds for every connector whose rules ask for approval.
#[derive(Debug)]
pub(crate) struct ApprovalsConfig {
    /// Whether the file has the table.
    pub(crate) is_configured: bool,
    /// A request that nobody decides about for so long expires.
    pub(crate) expires_after: Duration,
    /// So long a call waits to learn how somebody stands.
    pub(crate) time_limit: Duration,
    /// So long after a denial the same person may ask again; never, where there is none.
    pub(crate) reapply_after: Option<Duration>,
    /// What somebody is told who was denied.
    pub(crate) denied: Text,
    /// The address under which approvers reach the connector's listener; links begin with it.
    pub(crate) link_base: Option<String>,
}

pub(super) fn read(section: &mut Section<'_>, messages: &Messages) -> ApprovalsConfig {
    let expires_after = section.duration("expires_after", 14 * DAY);
    if expires_after < Duration::from_secs(1) {
        section.complain("expires_after", "must be at least 1s");
    }
    let time_limit = section.duration("time_limit", ApprovalSettings::TIME_LIMIT);
    let reapply_after = section.parsed("reapply_after", "a duration such as \"30d\"", |text| {
        humantime::parse_duration(text).ok()
    });
    let denied = section.string("denied").unwrap_or_else(|| ApprovalSettings::DENIED.into());
    let denied = messages.text(&denied).unwrap_or_else(|error| {
        section.complain("denied", error.to_string());
        Text::plain(ApprovalSettings::DENIED)
    });
    let expected = "the address that approvers call, such as \"https://signup.contoso.com\"";
    let link_base = section.parsed("link_base", expected, |text| {
        let known = ["https://", "http://"].iter().any(|scheme| text.starts_with(scheme));
        known.then(|| text.trim_end_matches('/').to_owned())
    });
    let is_configured = section.is_present();
    ApprovalsConfig { is_configured, expires_after, time_limit, reapply_after, denied, link_base }
}
