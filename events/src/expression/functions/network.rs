//! Addresses and networks.

use std::net::IpAddr;

use cel::{
    DeclarationError, Env, ExecutionError,
    common::{
        types::{CelBool, LIST_TYPE, STRING_TYPE},
        value::{CowVal, Val},
    },
};
use ipnet::IpNet;

use super::{mail::text, no_sense};

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_overload("ip_in", "ip_in_text", vec![STRING_TYPE, STRING_TYPE], ip_in)?;
    env.add_overload("ip_in", "ip_in_list", vec![STRING_TYPE, LIST_TYPE], ip_in)
}

/// Whether an address is in a network, or in one of several.
fn ip_in<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let [ip, networks] = args.as_slice() else {
        return Err(ExecutionError::invalid_argument_count(2, args.len()));
    };
    let ip = address(text(ip.as_ref())?.inner()).ok_or_else(|| no_sense("ip_in", "address"))?;
    let is_in = |of: &dyn Val| -> Result<bool, ExecutionError> {
        let network = network(text(of)?.inner()).ok_or_else(|| no_sense("ip_in", "network"))?;
        Ok(network.contains(&ip))
    };
    let Some(list) = networks.as_iterable() else {
        return is_in(networks.as_ref()).map(|it| CowVal::owned(CelBool::from(it)));
    };
    let mut networks = list.iter();
    while let Some(network) = networks.next() {
        if is_in(network)? {
            return Ok(CowVal::owned(CelBool::from(true)));
        }
    }
    Ok(CowVal::owned(CelBool::from(false)))
}

/// An IPv4 address that is written as an IPv6 one is still the same machine.
fn address(text: &str) -> Option<IpAddr> {
    text.trim().parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

/// A network, or one address.
fn network(text: &str) -> Option<IpNet> {
    let text = text.trim();
    let Some((_, _)) = text.split_once('/') else {
        return address(text).map(IpNet::from);
    };
    let network = text.parse::<IpNet>().ok()?;
    // ::ffff:10.0.0.0/104 is 10.0.0.0/8.
    match (network.addr().to_canonical(), network.prefix_len()) {
        (IpAddr::V4(ip), bits) if network.addr().is_ipv6() && bits >= 96 => {
            IpNet::new(ip.into(), bits - 96).ok()
        }
        _ => Some(network),
    }
}

/// Why a written network is none.
pub(super) fn network_fault(written: &str) -> Option<String> {
    let message = || format!("`{written}` is no address and no network, such as `10.0.0.0/8`");
    network(written).is_none().then(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn is_in(ip: &str, of: &str) -> Option<bool> {
        Some(network(of)?.contains(&address(ip)?))
    }

    #[test]
    fn an_address_is_in_its_networks() {
        for (ip, network, expected) in [
            ("10.1.2.3", "10.0.0.0/8", Some(true)),
            ("11.1.2.3", "10.0.0.0/8", Some(false)),
            ("::ffff:10.1.2.3", "10.0.0.0/8", Some(true)),
            ("10.1.2.3", "::ffff:10.0.0.0/104", Some(true)),
            ("11.1.2.3", "::ffff:10.0.0.0/104", Some(false)),
            (" 2001:db8::1 ", "2001:db8::/32", Some(true)),
            ("2001:db9::1", "2001:db8::/32", Some(false)),
            ("192.0.2.1", "192.0.2.1", Some(true)),
            ("192.0.2.1", "0.0.0.0/0", Some(true)),
            ("192.0.2.1", "2001:db8::/32", Some(false)),
            ("192.0.2.1", "192.0.2.0/33", None),
            ("192.0.2", "192.0.2.0/24", None),
            ("", "192.0.2.0/24", None),
        ] {
            assert_eq!(is_in(ip, network), expected, "{ip} in {network}");
        }
    }

    proptest! {
        #[test]
        fn networks_hold_what_begins_as_they_do(ip in any::<u32>(), other in any::<u32>(), bits in 0..=32_u8) {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            let [ip_text, other_text] = [ip, other].map(|ip| std::net::Ipv4Addr::from(ip).to_string());
            let network = format!("{ip_text}/{bits}");
            prop_assert_eq!(is_in(&other_text, &network), Some(ip & mask == other & mask));
            prop_assert_eq!(is_in(&ip_text, &network), Some(true));
        }

        #[test]
        fn nothing_makes_it_panic(ip in "[0-9a-f.:/]{0,20}|.{0,20}", network in "[0-9a-f.:/]{0,20}") {
            let _ = is_in(&ip, &network);
        }
    }
}
