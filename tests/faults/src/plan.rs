//! Which faults happen when: a pure function of a seed.

use std::{fmt, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use uuid::Uuid;

/// How the product is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Topology {
    /// Everything in one process, with SQLite.
    Embedded,
    /// Processes of their own over one nats-server and PostgreSQL.
    Single,
    /// The same over three nats-servers with three replicas.
    Cluster,
}

/// Something that runs and can be killed or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Embedded, everything.
    Connector,
    Relay,
    Worker(Worker),
    /// Of several, the one that leads the stream.
    Nats,
    Postgres,
}

/// The workers of a run: built-in ones, and two that an operations team would add.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Worker {
    Database,
    Permissions,
    Notify,
    /// A subscriber's webhook.
    Hook,
    /// A subscriber's command.
    Script,
    /// Gives up everybody whose account does not show, and here none does.
    Confirm,
}

/// Who talks to whom over a network of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Link {
    PlatformToConnector,
    RelayToNats,
    WorkerToNats(Worker),
    WorkerToPostgres(Worker),
    WorkerToTarget(Worker),
}

/// What the target of notifications and of the webhook does to those who call it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mood {
    #[default]
    Fine,
    /// 500 to every second call.
    Stumbling,
    /// 503.
    Down,
    /// 429 with a `Retry-After`.
    Throttling,
    /// 400 to some, for good.
    Refusing,
    /// Takes it, and answers when nobody waits any more.
    Mute,
}

/// A sort of fault, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// SIGKILL, and a start after a while.
    Kill(Part),
    /// SIGSTOP, and SIGCONT after a while.
    Pause(Part),
    Cut(Link),
    /// Half-open: connections stay and nothing passes.
    Silence(Link),
    Slow(Link),
    /// The wall clock jumps so far, and back after a while.
    ClockAhead(Part),
    ClockBehind(Part),
    /// Where the connector keeps its log; embedded, the store too.
    FullDisk,
    /// The stream delivers again, and out of order, what was acknowledged.
    Redeliver(Worker),
    Target(Mood),
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kind: Kind,
    pub lasts: Duration,
}

/// A fault with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// It begins when so many people have begun to sign up.
    pub at: u64,
    pub fault: Fault,
}

/// All faults of a run, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan(pub Vec<Planned>);

impl Plan {
    /// Each sort of fault comes up once before any comes up again.
    #[must_use]
    pub fn new(seed: u64, topology: Topology, faults: usize, sign_ups: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut deck = Vec::new();
        let mut plan = Vec::with_capacity(faults);
        for number in 0..faults {
            let kind = deck.pop().unwrap_or_else(|| {
                deck = topology.kinds();
                deck.shuffle(&mut rng);
                deck.pop().expect("every topology has faults")
            });
            let fault = Fault { kind, lasts: lasts(&mut rng, kind) };
            // Spread over the run; the last leave people to sign up afterwards.
            let slot = sign_ups / (faults as u64 + 1);
            let at = slot * number as u64 + rng.random_range(0..=slot);
            plan.push(Planned { at, fault });
        }
        plan.sort_by_key(|it| it.at);
        Self(plan)
    }
}

fn lasts(rng: &mut StdRng, kind: Kind) -> Duration {
    let milliseconds = match kind {
        // How long whoever supervises it takes to notice.
        Kind::Kill(_) => 0..500,
        Kind::Redeliver(_) => 0..1,
        _ => 100..2500,
    };
    Duration::from_millis(rng.random_range(milliseconds))
}

impl Topology {
    /// All that can happen to such a set-up.
    #[must_use]
    pub fn kinds(self) -> Vec<Kind> {
        use Kind::{
            ClockAhead, ClockBehind, Cut, FullDisk, Kill, Pause, Redeliver, Silence, Slow, Target,
        };
        let mut parts = vec![Part::Connector];
        let mut links = vec![Link::PlatformToConnector];
        links.extend(Worker::CALLERS.map(Link::WorkerToTarget));
        let mut kinds = vec![FullDisk];
        if self != Self::Embedded {
            parts.extend([Part::Relay, Part::Nats, Part::Postgres]);
            parts.extend(Worker::HOSTS.map(Part::Worker));
            links.push(Link::RelayToNats);
            links.extend(Worker::HOSTS.map(Link::WorkerToNats));
            links.extend(Worker::HOSTS.map(Link::WorkerToPostgres));
            kinds.extend(Worker::ALL.map(Redeliver));
        }
        for part in parts {
            kinds.extend([Kill(part), Pause(part)]);
            // What servers make of the time is not ours.
            if !matches!(part, Part::Nats | Part::Postgres) {
                kinds.extend([ClockAhead(part), ClockBehind(part)]);
            }
        }
        for link in links {
            kinds.extend([Cut(link), Silence(link), Slow(link)]);
        }
        kinds.extend(Mood::BAD.map(Target));
        kinds
    }
}

impl Worker {
    pub const ALL: [Self; 6] =
        [Self::Database, Self::Permissions, Self::Notify, Self::Hook, Self::Script, Self::Confirm];

    /// Those that have a process where they can; what it runs besides, [`Self::beside`] says.
    pub const HOSTS: [Self; 4] = [Self::Database, Self::Permissions, Self::Notify, Self::Hook];

    /// Those that call the target.
    pub(crate) const CALLERS: [Self; 2] = [Self::Notify, Self::Hook];

    /// The workers in the process of this one: a process may have several.
    pub(crate) const fn beside(self) -> &'static [Self] {
        match self {
            Self::Hook => &[Self::Script, Self::Confirm],
            _ => &[],
        }
    }

    /// By which whoever is told of an event knows it again, where that is made of the event alone.
    pub(crate) fn key(self, event: Uuid) -> Option<String> {
        match self {
            Self::Hook => Some(format!("{event}:hook")),
            Self::Script => Some(event.to_string()),
            _ => None,
        }
    }

    /// The name in configuration, stream and store.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Database => "database",
            Self::Permissions => "permissions",
            Self::Notify => "notify",
            Self::Hook => "hook",
            Self::Script => "script",
            Self::Confirm => "confirm",
        }
    }
}

impl Mood {
    const BAD: [Self; 5] =
        [Self::Stumbling, Self::Down, Self::Throttling, Self::Refusing, Self::Mute];
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connector => f.write_str("connector"),
            Self::Relay => f.write_str("relay"),
            Self::Worker(worker) => write!(f, "worker {}", worker.as_str()),
            Self::Nats => f.write_str("nats-server"),
            Self::Postgres => f.write_str("PostgreSQL"),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PlatformToConnector => f.write_str("platform – connector"),
            Self::RelayToNats => f.write_str("relay – NATS"),
            Self::WorkerToNats(worker) => write!(f, "{} – NATS", worker.as_str()),
            Self::WorkerToPostgres(worker) => write!(f, "{} – PostgreSQL", worker.as_str()),
            Self::WorkerToTarget(worker) => write!(f, "{} – target", worker.as_str()),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(part) => write!(f, "kill {part}"),
            Self::Pause(part) => write!(f, "stop {part}"),
            Self::Cut(link) => write!(f, "cut {link}"),
            Self::Silence(link) => write!(f, "silence {link}"),
            Self::Slow(link) => write!(f, "slow {link}"),
            Self::ClockAhead(part) => write!(f, "clock ahead {part}"),
            Self::ClockBehind(part) => write!(f, "clock behind {part}"),
            Self::FullDisk => f.write_str("full disk"),
            Self::Redeliver(worker) => write!(f, "deliver again to {}", worker.as_str()),
            Self::Target(mood) => write!(f, "target {}", format!("{mood:?}").to_lowercase()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn topologies() -> impl Strategy<Value = Topology> {
        prop_oneof![Just(Topology::Embedded), Just(Topology::Single), Just(Topology::Cluster)]
    }

    proptest! {
        #[test]
        fn the_same_seed_is_the_same_plan_and_its_faults_lie_within_the_run(
            seed: u64, topology in topologies(), faults in 0_usize..300, sign_ups in 1_u64..100_000
        ) {
            let plan = Plan::new(seed, topology, faults, sign_ups);

            prop_assert_eq!(&plan, &Plan::new(seed, topology, faults, sign_ups));
            prop_assert_eq!(plan.0.len(), faults);
            prop_assert!(plan.0.is_sorted_by_key(|it| it.at));
            prop_assert!(plan.0.iter().all(|it| it.at <= sign_ups));
            prop_assert!(plan.0.iter().all(|it| it.fault.lasts < Duration::from_millis(2500)));
        }

        #[test]
        fn every_fault_comes_up_before_one_comes_up_again(
            seed: u64, topology in topologies(), rounds in 1_usize..4
        ) {
            let all = topology.kinds();
            let plan = Plan::new(seed, topology, rounds * all.len(), 1000);

            let mut counts: HashMap<Kind, usize> = HashMap::new();
            for it in &plan.0 {
                *counts.entry(it.fault.kind).or_default() += 1;
            }

            prop_assert!(all.iter().all(|kind| counts[kind] == rounds));
        }
    }

    #[test]
    fn seeds_differ() {
        let plan = |seed| Plan::new(seed, Topology::Single, 20, 1000);
        assert_ne!(plan(1), plan(2));
    }
}
