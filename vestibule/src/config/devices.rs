//! The `[devices]` table: who may register people's devices.

use vestibule_api::DeviceDesk;

use super::{SecretSource, reader::Section, secret};

/// Without a token, nobody registers anything.
#[derive(Debug)]
pub(crate) struct DevicesConfig {
    pub(crate) token: SecretSource,
    /// The hosts, with their subdomains, to which endpoints of browsers may lead.
    pub(crate) push_services: Vec<String>,
}

pub(super) fn read(section: &mut Section<'_>) -> Option<DevicesConfig> {
    let token = secret(section, "token");
    let expected = "hosts such as \"updates.push.services.mozilla.com\"";
    let is_host = |it: &str| {
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-');
        !it.is_empty() && !it.starts_with('.') && it.chars().all(good)
    };
    let hosts = section.list("push_services", expected, |it| is_host(it).then(|| it.to_owned()));
    if section.is_present() && !section.has("token") {
        section.complain("", "needs the key `token`: without one nobody can register a device");
    }
    let push_services = if section.has("push_services") {
        hosts
    } else {
        DeviceDesk::PUSH_SERVICES.map(str::to_owned).to_vec()
    };
    Some(DevicesConfig { token: token?, push_services })
}
