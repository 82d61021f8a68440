//! What the connection counts.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::publish;

#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    pub(super) publishes: Family<PublishLabels, Counter>,
    pub(super) connects: Counter,
    pub(super) disconnects: Counter,
    pub(super) rebuilds: Family<RebuildLabels, Counter>,
    pub(super) acknowledgements: Family<AcknowledgeLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct PublishLabels {
    pub(super) result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RebuildLabels {
    pub(super) consumer: Arc<str>,
    pub(super) cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct AcknowledgeLabels {
    pub(super) kind: &'static str,
    pub(super) result: &'static str,
}

impl Metrics {
    pub(super) fn published(&self, result: &'static str) {
        self.publishes.get_or_create(&PublishLabels { result }).inc();
    }

    pub(super) fn acknowledged(&self, kind: &'static str, result: &'static str) {
        self.acknowledgements.get_or_create(&AcknowledgeLabels { kind, result }).inc();
    }

    /// What a consumer counts is there from its start, for the same reason as below.
    pub(super) fn consumes(&self, consumer: &Arc<str>, causes: &[&'static str]) {
        for kind in ["ack", "nack", "progress"] {
            for result in ["taken", "failed"] {
                drop(self.acknowledgements.get_or_create(&AcknowledgeLabels { kind, result }));
            }
        }
        for cause in causes {
            let labels = RebuildLabels { consumer: Arc::clone(consumer), cause };
            drop(self.rebuilds.get_or_create(&labels));
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        // There from the start, so that the first refusal is an increase and not a new series.
        for result in publish::RESULTS {
            drop(self.publishes.get_or_create(&PublishLabels { result }));
        }
        let registry = registry.sub_registry_with_prefix("stream");
        registry.register("publishes", "Events published, by result", self.publishes.clone());
        registry.register("connects", "Connections made to NATS", self.connects.clone());
        registry.register("disconnects", "Connections lost to NATS", self.disconnects.clone());
        registry.register(
            "consumer_rebuilds",
            "Consumers restored after silence or an error",
            self.rebuilds.clone(),
        );
        registry.register(
            "acknowledgements",
            "Words about deliveries, by kind and result",
            self.acknowledgements.clone(),
        );
    }
}
