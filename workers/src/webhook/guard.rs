//! Which addresses a subscriber may have, judged when a connection is made.
//!
//! Whoever names a subscriber's address could otherwise have us post people's data to what lies
//! behind our own firewall, or read a cloud's credentials at 169.254.169.254. A name is resolved
//! here, each of its addresses is judged, and the connection goes to one that passed: nobody asks
//! the name again in between, so that it cannot answer differently the second time. What stands as
//! an address in the URL is judged too. Private networks are open where the operators say so.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use futures_util::future::BoxFuture;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};

use crate::{Cause, HandleError};

/// Judges where connections go; a resolver for the HTTP client.
#[derive(Clone)]
pub(super) struct Guard {
    networks: Arc<[IpNet]>,
    /// Without TLS, only to private networks: on the internet everybody could read along.
    encrypted: bool,
    lookup: Lookup,
}

/// How a name becomes addresses.
pub(super) type Lookup =
    Arc<dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync>;

/// Nothing is sent to this address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error(
        "the address {address} is {what}, so nothing is sent there; if the subscriber is meant to \
         be there, add its network to `networks`"
    )]
    Special { address: IpAddr, what: &'static str },
    #[error("the address {0} is public, so nothing is sent there without TLS; use https")]
    InTheClear(IpAddr),
    #[error("the subscriber's name has no address")]
    NoAddress,
}

impl Guard {
    pub(super) fn new(url: &Url, networks: &[IpNet], lookup: Lookup) -> Self {
        Self { networks: networks.into(), encrypted: is_encrypted(url), lookup }
    }

    fn judge(&self, address: IpAddr) -> Result<(), Refused> {
        judge(address, &self.networks, self.encrypted)
    }
}

/// Judges a URL that holds an address and not a name: for those no resolver is asked.
pub(super) fn check(url: &Url, networks: &[IpNet]) -> Result<(), Refused> {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host.parse().map_or(Ok(()), |address| judge(address, networks, is_encrypted(url)))
}

fn is_encrypted(url: &Url) -> bool {
    url.scheme() == "https"
}

fn judge(address: IpAddr, networks: &[IpNet], encrypted: bool) -> Result<(), Refused> {
    allowed(address, networks)?;
    if !encrypted && special(address).is_none() {
        return Err(Refused::InTheClear(address));
    }
    Ok(())
}

impl From<Refused> for HandleError {
    fn from(refused: Refused) -> Self {
        Self::retry(Cause::NotPermitted, refused)
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guard({:?})", self.networks)
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let (guard, lookup) = (self.clone(), (self.lookup)(name.as_str().to_owned()));
        Box::pin(async move {
            let mut refused = Refused::NoAddress;
            let mut passed = Vec::new();
            for address in lookup.await? {
                match guard.judge(address) {
                    // The port is the URL's.
                    Ok(()) => passed.push(SocketAddr::new(address, 0)),
                    Err(why) => refused = why,
                }
            }
            if passed.is_empty() {
                return Err(refused.into());
            }
            Ok(Box::new(passed.into_iter()) as Addrs)
        })
    }
}

/// As every program on this machine resolves names.
pub(super) fn ask_the_system() -> Lookup {
    Arc::new(|name| {
        Box::pin(async move {
            let addresses = tokio::net::lookup_host((name, 0)).await?;
            Ok(addresses.map(|it| it.ip()).collect())
        })
    })
}

/// Whether something may be sent to an address: a public one, or one within these networks.
pub(super) fn allowed(address: IpAddr, networks: &[IpNet]) -> Result<(), Refused> {
    let Some(what) = special(address) else { return Ok(()) };
    let reached = reached(address);
    if networks.iter().any(|it| it.contains(&address) || it.contains(&reached)) {
        return Ok(());
    }
    Err(Refused::Special { address, what })
}

/// What keeps an address from being one of the public internet.
fn special(address: IpAddr) -> Option<&'static str> {
    match reached(address) {
        IpAddr::V4(address) => {
            SPECIAL_V4.iter().find(|(net, _)| net.contains(&address)).map(|(_, what)| *what)
        }
        IpAddr::V6(address) => SPECIAL_V6
            .iter()
            .find(|(net, _)| net.contains(&address))
            .map(|(_, what)| *what)
            .or_else(|| (!GLOBAL_V6.contains(&address)).then_some("not a global one")),
    }
}

/// The address at which a packet arrives in the end: some of IPv6 only carry one of IPv4.
///
/// An IPv6-only machine reaches IPv4 by the well-known prefix of NAT64, so that one is looked through. The
/// other ways of embedding are history, or local, and are refused as they are.
fn reached(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if NAT64.contains(&address) => {
            let [.., a, b, c, d] = address.octets();
            Ipv4Addr::new(a, b, c, d).into()
        }
        canonical => canonical,
    }
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, c: u16, h: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, h), prefix)
}

const NAT64: Ipv6Net = v6(0x64, 0xff9b, 0, 0, 96);

/// All of the public internet lies within it.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 0, 0, 3);

/// As in the registries of IANA (RFC 6890).
const SPECIAL_V4: [(Ipv4Net, &str); 15] = [
    (v4(0, 0, 0, 0, 8), "this machine or none"),
    (v4(10, 0, 0, 0, 8), "private"),
    (v4(100, 64, 0, 0, 10), "shared by the customers of a carrier"),
    (v4(127, 0, 0, 0, 8), "this machine"),
    (v4(169, 254, 0, 0, 16), "link-local"),
    (v4(172, 16, 0, 0, 12), "private"),
    (v4(192, 0, 0, 0, 24), "reserved for protocols"),
    (v4(192, 0, 2, 0, 24), "for documentation"),
    (v4(192, 88, 99, 0, 24), "a relay of 6to4"),
    (v4(192, 168, 0, 0, 16), "private"),
    (v4(198, 18, 0, 0, 15), "for benchmarks"),
    (v4(198, 51, 100, 0, 24), "for documentation"),
    (v4(203, 0, 113, 0, 24), "for documentation"),
    (v4(224, 0, 0, 0, 4), "multicast"),
    (v4(240, 0, 0, 0, 4), "reserved"),
];

const SPECIAL_V6: [(Ipv6Net, &str); 13] = [
    (v6(0, 0, 0, 1, 128), "this machine"),
    (v6(0, 0, 0, 0, 128), "this machine or none"),
    (v6(0, 0, 0, 0, 96), "an embedded one of IPv4"),
    (v6(0x64, 0xff9b, 1, 0, 48), "a translation of a local network"),
    (v6(0xfc00, 0, 0, 0, 7), "private"),
    (v6(0xfe80, 0, 0, 0, 10), "link-local"),
    (v6(0xfec0, 0, 0, 0, 10), "site-local"),
    (v6(0xff00, 0, 0, 0, 8), "multicast"),
    (v6(0x2001, 0, 0, 0, 32), "an embedded one of IPv4 (Teredo)"),
    (v6(0x2001, 0, 0, 0, 23), "reserved for protocols"),
    (v6(0x2001, 0xdb8, 0, 0, 32), "for documentation"),
    (v6(0x2002, 0, 0, 0, 16), "an embedded one of IPv4 (6to4)"),
    (v6(0x3fff, 0, 0, 0, 20), "for documentation"),
];

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;

    const PUBLIC: &[&str] = &[
        "1.1.1.1",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.0.3.0",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "203.0.112.255",
        "203.0.114.0",
        "223.255.255.255",
        "2000::",
        "2001:200::1",
        "2001:4860:4860::8888",
        "2606:4700:4700::1111",
        "2a00:1450:4001::1",
        "2003::1",
        "3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "3fff:1000::",
        // What they carry is public.
        "::ffff:1.1.1.1",
        "64:ff9b::1.1.1.1",
    ];

    const SPECIAL: &[(&str, &str)] = &[
        ("0.0.0.0", "none"),
        ("0.255.255.255", "none"),
        ("10.0.0.0", "private"),
        ("10.255.255.255", "private"),
        ("100.64.0.0", "carrier"),
        ("100.127.255.255", "carrier"),
        ("127.0.0.1", "this machine"),
        ("127.255.255.255", "this machine"),
        ("169.254.169.254", "link-local"),
        ("172.16.0.0", "private"),
        ("172.31.255.255", "private"),
        ("192.0.0.8", "protocols"),
        ("192.0.2.1", "documentation"),
        ("192.88.99.1", "6to4"),
        ("192.168.0.1", "private"),
        ("198.18.0.0", "benchmarks"),
        ("198.19.255.255", "benchmarks"),
        ("198.51.100.1", "documentation"),
        ("203.0.113.255", "documentation"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.255", "multicast"),
        ("240.0.0.0", "reserved"),
        ("255.255.255.255", "reserved"),
        ("::", "none"),
        ("::1", "this machine"),
        ("::2", "embedded"),
        ("::127.0.0.1", "embedded"),
        ("::1.1.1.1", "embedded"),
        ("::ffff:127.0.0.1", "this machine"),
        ("::ffff:169.254.169.254", "link-local"),
        ("::ffff:a00:1", "private"),
        ("64:ff9b::127.0.0.1", "this machine"),
        ("64:ff9b::a9fe:a9fe", "link-local"),
        ("64:ff9b::10.0.0.1", "private"),
        ("64:ff9b:1::1.1.1.1", "local network"),
        ("64:ff9b:1:ffff::a9fe:a9fe", "local network"),
        ("64:ff9b:2::1", "not a global"),
        ("100::1", "not a global"),
        ("1fff:ffff::", "not a global"),
        ("4000::", "not a global"),
        ("5f00::1", "not a global"),
        ("2001::1", "Teredo"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "Teredo"),
        ("2001:2::1", "protocols"),
        ("2001:10::1", "protocols"),
        ("2001:20::1", "protocols"),
        ("2001:1ff:ffff::", "protocols"),
        ("2001:db8::1", "documentation"),
        ("2002:7f00:1::", "6to4"),
        ("2002:a9fe:a9fe::1", "6to4"),
        ("2002:101:101::1", "6to4"),
        ("3fff::1", "documentation"),
        ("3fff:fff:ffff::1", "documentation"),
        ("fc00::1", "private"),
        ("fd00:ec2::254", "private"),
        ("fe80::1", "link-local"),
        ("febf::1", "link-local"),
        ("fec0::1", "site-local"),
        ("ff02::1", "multicast"),
    ];

    fn networks(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|it| it.parse().unwrap()).collect()
    }

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    fn checked(text: &str, open: &[&str]) -> Result<(), Refused> {
        check(&url(text), &networks(open))
    }

    #[test]
    fn only_the_public_internet_is_open() {
        for text in PUBLIC {
            let address = text.parse().unwrap();
            assert_eq!(allowed(address, &[]), Ok(()), "{text}");
        }
        for (text, what) in SPECIAL {
            let address = text.parse().unwrap();
            let refused = allowed(address, &[]).expect_err(text).to_string();
            assert!(refused.contains(what) && refused.contains("`networks`"), "{refused}");
        }
    }

    #[test]
    fn a_network_is_open_where_the_operators_say_so_however_it_is_written() {
        let open = networks(&["10.1.0.0/16", "fd00:1::/32"]);
        for (text, is_open) in [
            ("10.1.2.3", true),
            ("10.2.0.0", false),
            ("::ffff:10.1.2.3", true),
            ("::ffff:10.2.2.3", false),
            ("64:ff9b::10.1.2.3", true),
            ("2002:a01:203::1", false),
            ("fd00:1::5", true),
            ("fd00:2::5", false),
            ("127.0.0.1", false),
        ] {
            assert_eq!(allowed(text.parse().unwrap(), &open).is_ok(), is_open, "{text}");
        }
        let mapped = networks(&["64:ff9b::/96", "2002:a01::/32"]);
        assert_eq!(allowed("64:ff9b::10.9.9.9".parse().unwrap(), &mapped), Ok(()));
        assert_eq!(allowed("2002:a01:203::1".parse().unwrap(), &mapped), Ok(()));
    }

    #[test]
    fn an_address_in_the_url_is_judged_however_it_is_spelt() {
        for text in [
            "https://127.0.0.1/",
            "https://127.1/",
            "https://127.0.1/",
            "https://2130706433/",
            "https://0x7f000001/",
            "https://0x7F.1/",
            "https://017700000001/",
            "https://0177.0.0.1/",
            "https://127.0.0.1./",
            "https://127%2e0.0.1/",
            "https://127。0。0。1/",
            "https://１２７.0.0.1/",
            "https://①②⑦.⓪.⓪.①/",
            "https://user@127.0.0.1/",
            "https://0/",
            "https://2852039166/latest/meta-data",
            "https://0xA9FEA9FE/",
            "https://[::1]/",
            "https://[::]/",
            "https://[0:0:0:0:0:ffff:7f00:1]/",
            "https://[::ffff:169.254.169.254]/",
            "https://[64:ff9b::169.254.169.254]/",
            "https://[2002:7f00:1::]/",
            "https://[fe80::1]/",
            "https://[fd00:ec2::254]/",
        ] {
            let refused = checked(text, &[]);
            assert!(matches!(refused, Err(Refused::Special { .. })), "{text}: {refused:?}");
        }
        for text in ["https://1.1.1.1/", "https://16843009/", "https://[2606:4700::1]/"] {
            assert_eq!(checked(text, &[]), Ok(()), "{text}");
        }
        // Names are judged once they are resolved.
        for text in ["https://localhost/", "https://127.0.0.1.example.com/"] {
            assert_eq!(checked(text, &[]), Ok(()), "{text}");
        }
    }

    #[test]
    fn without_tls_only_private_networks_are_open() {
        let open = ["10.0.0.0/8", "1.1.1.0/24"];
        let check = |text| checked(text, &open);
        assert_eq!(check("http://10.0.0.1/"), Ok(()));
        assert_eq!(check("https://10.0.0.1/"), Ok(()));
        assert_eq!(check("https://1.1.1.1/"), Ok(()));
        let public = "1.1.1.1".parse().unwrap();
        assert_eq!(check("http://1.1.1.1/"), Err(Refused::InTheClear(public)));
        assert!(check("http://127.0.0.1/").is_err());
    }

    /// A name that has these addresses the first time, those the second time, and so on.
    fn rebinding(answers: &'static [&'static [&'static str]]) -> Lookup {
        let asked = AtomicUsize::new(0);
        Arc::new(move |_| {
            let turn = asked.fetch_add(1, Ordering::SeqCst).min(answers.len() - 1);
            let addresses = answers[turn].iter().map(|it| it.parse().unwrap()).collect();
            Box::pin(async move { Ok(addresses) })
        })
    }

    async fn resolved(guard: &Guard) -> Result<Vec<String>, String> {
        let name = "subscriber.example.com".parse().unwrap();
        let addresses = guard.resolve(name).await.map_err(|error| error.to_string())?;
        Ok(addresses.map(|it| it.ip().to_string()).collect())
    }

    #[tokio::test]
    async fn a_name_gives_the_addresses_that_passed_and_no_other() {
        let of = url("https://subscriber.example.com/");
        let answers: &[&[&str]] = &[
            &["1.1.1.1", "127.0.0.1", "2606:4700::1", "::1"],
            &["127.0.0.1", "169.254.169.254"],
            &["1.1.1.1"],
            &[],
        ];
        let guard = Guard::new(&of, &[], rebinding(answers));

        assert_eq!(resolved(&guard).await.unwrap(), ["1.1.1.1", "2606:4700::1"]);
        assert!(resolved(&guard).await.unwrap_err().contains("link-local"));
        assert_eq!(resolved(&guard).await.unwrap(), ["1.1.1.1"]);
        assert!(resolved(&guard).await.unwrap_err().contains("has no address"));
    }

    #[tokio::test]
    async fn the_machine_itself_is_refused_by_its_name() {
        let guard = Guard::new(&url("https://localhost/"), &[], ask_the_system());
        let refused = guard.resolve("localhost".parse().unwrap()).await.map(|_| ());
        assert!(refused.unwrap_err().to_string().contains("this machine"));
    }

    proptest! {
        #[test]
        fn what_carries_an_ipv4_address_is_never_more_open_than_it(bits: u32) {
            let v4 = Ipv4Addr::from_bits(bits);
            let [high, low] = [(bits >> 16) as u16, bits as u16];
            let is_open = allowed(v4.into(), &[]).is_ok();
            for v6 in [
                Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, high, low),
                Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
            ] {
                prop_assert_eq!(allowed(v6.into(), &[]).is_ok(), is_open, "{}", v6);
            }
            for v6 in [
                Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
                Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
                Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, !high, !low),
                Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, high, low),
            ] {
                prop_assert!(allowed(v6.into(), &[]).is_err(), "{}", v6);
            }
        }
    }
}
