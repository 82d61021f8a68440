//! `vestibule ready`: asks an admin listener, for health checks of containers.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;

use crate::{config::Config, print::say};

pub(crate) async fn ready(
    admin: Option<SocketAddr>,
    load: impl Fn() -> anyhow::Result<Config>,
) -> anyhow::Result<ExitCode> {
    // With an address there is no need of a configuration, which may be out of reach here.
    let mut admin = admin.map_or_else(|| load().map(|config| config.listen.admin), Ok)?;
    if admin.ip().is_unspecified() {
        // It listens everywhere, so here too.
        admin.set_ip(if admin.is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        });
    }
    let url = format!("http://{admin}/readyz");
    let client = reqwest::Client::builder().timeout(Duration::from_secs(3)).build()?;
    let answer = client
        .get(&url)
        .send()
        .await
        .with_context(|| format!("nobody answers at {url}; is the process running?"))?;
    let ready = answer.status().is_success();
    say!("{}", answer.text().await?)?;
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
