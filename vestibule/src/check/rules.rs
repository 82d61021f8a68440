//! Rules that can do nothing, or not what they say.

use vestibule_api::DescribedRule;
use vestibule_events::{Mode, Protocol, Step};

use super::places::Places;
use crate::config::{Config, ConnectorConfig, EffectConfig};

pub(super) fn warnings(config: &Config, places: &Places) -> Vec<String> {
    let mut warnings: Vec<String> =
        config.connectors.iter().flat_map(|it| of_connector(it, config, places)).collect();
    for gap in config.reference.messages.gaps() {
        warnings.push(format!("messages: {gap}"));
    }
    warnings
}

fn of_connector(connector: &ConnectorConfig, config: &Config, places: &Places) -> Vec<String> {
    let name = connector.name.as_str();
    let unreachable = connector.rules.unreachable().into_iter().map(|it| {
        let warning = format!("`{}` never has an effect: {}", it.rule, it.because);
        (it.index, warning)
    });
    let unsaid = connector.rules.described().enumerate().flat_map(|(index, rule)| {
        unsaid(connector.protocol, &rule).into_iter().map(move |it| (index, it))
    });
    let nobody = nobody_opens_requests(connector, config);
    let mut found: Vec<_> = unreachable.chain(unsaid).chain(nobody).collect();
    found.sort_by_key(|(index, _)| *index);
    let mut warnings: Vec<_> =
        found.iter().map(|(index, it)| places.about_rule(name, *index, it)).collect();
    warnings.extend(everywhere(connector));
    warnings
}

/// What a rule decides and an answer of its connector cannot say.
fn unsaid(protocol: Protocol, rule: &DescribedRule<'_>) -> Option<String> {
    let DescribedRule { name, steps, outcome, .. } = rule;
    let runs_everywhere = steps.len() == Step::ALL.len();
    if rule.mode != Mode::Enforce || runs_everywhere {
        return None;
    }
    let runs = |step| steps.contains(&step);
    let turns_away = rule.turns_away || rule.on_error_turns_away;
    if protocol == Protocol::CustomExtension && runs(Step::BeforeToken) && turns_away {
        return Some(format!(
            "`{name}` turns nobody away at before-token: an answer of custom-extension cannot say \
             so there, and the person goes on"
        ));
    }
    // A custom policy shows the message whatever the step.
    let has_no_form = protocol != Protocol::CustomPolicy && *outcome == "reject";
    let without_a_form: Vec<_> = [Step::AfterFederation, Step::BeforeToken]
        .into_iter()
        .filter(|step| has_no_form && runs(*step))
        .map(Step::as_str)
        .collect();
    (!without_a_form.is_empty()).then(|| {
        let steps = without_a_form.join(" and ");
        format!("`{name}` shows a block page at {steps}: there is no form to show an error on")
    })
}

/// Rules for every step, told once for all of them: that is how most are written.
fn everywhere(connector: &ConnectorConfig) -> Option<String> {
    let rules = connector.rules.described().filter(|rule| {
        rule.steps.len() == Step::ALL.len() && rule.turns_away && rule.mode == Mode::Enforce
    });
    let count = rules.count();
    (connector.protocol == Protocol::CustomExtension && count > 0).then(|| {
        format!(
            "connectors.{}: {count} rules without `steps` turn people away, which an answer at \
             before-token cannot say; that matters only where the connector is called then",
            connector.name
        )
    })
}

/// A request for approval that nobody opens is one that nobody can decide.
fn nobody_opens_requests(connector: &ConnectorConfig, config: &Config) -> Option<(usize, String)> {
    let opens = config.workers.iter().any(|worker| {
        let connectors = &worker.settings.filter.connectors;
        matches!(worker.effect, EffectConfig::Approvals(_))
            && (connectors.is_empty() || connectors.contains(&connector.name))
    });
    let asks =
        |rule: &DescribedRule<'_>| rule.mode == Mode::Enforce && rule.outcome == "require_approval";
    let (index, rule) = connector.rules.described().enumerate().find(|(_, rule)| asks(rule))?;
    (!opens).then(|| {
        let warning = format!(
            "`{}` asks for approval, and no worker keeps the requests: add [workers.approvals]",
            rule.name
        );
        (index, warning)
    })
}
