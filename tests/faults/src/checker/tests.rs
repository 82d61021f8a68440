use proptest::prelude::*;

use super::*;

const DEADLINE: Duration = Duration::from_millis(800);
const QUICK: Moment = 5_000;

/// What a run leaves behind when nothing goes wrong.
#[derive(Default)]
struct Story(Readings);

impl Story {
    /// One sign-up per answer, each with the event and the effects that belong to it.
    fn of(answers: &[Answer]) -> Self {
        let mut story = Self::default();
        for (number, answer) in answers.iter().enumerate() {
            story.sign_up(number as u64, *answer);
        }
        story
    }

    fn sign_up(&mut self, sign_up: u64, answer: Answer) {
        let at = sign_up * 1_000_000;
        self.call(sign_up, sign_up, at);
        self.answer(sign_up, at + QUICK, answer);
        if let Some(kind) = decided(Step::BeforeCreate, answer) {
            self.event(sign_up, sign_up, kind);
        }
    }

    fn call(&mut self, call: u64, sign_up: u64, at: Moment) {
        let step = Step::BeforeCreate;
        let email = address(sign_up);
        self.0.journal.push(Entry::Call { call, sign_up, step, email, at });
    }

    fn answer(&mut self, call: u64, at: Moment, answer: Answer) {
        let status = if answer == Answer::ValidationError { 400 } else { 200 };
        self.0.journal.push(Entry::Answered { call, at, status, answer });
    }

    fn event(&mut self, id: u64, sign_up: u64, kind: &str) {
        let (id, email) = (event(id), address(sign_up));
        let step = Some(Step::BeforeCreate);
        let closes = None;
        self.0.events.push(Event { id, kind: kind.to_owned(), step, email, closes });
        if kind == "accepted" {
            for (worker, what) in WANTED {
                self.effect(worker, what, id);
            }
        }
    }

    fn effect(&mut self, worker: Worker, what: &'static str, event: Uuid) {
        let key = if worker == Worker::Notify {
            Some(format!("notification {event}"))
        } else {
            worker.key(event)
        };
        if let Some(key) = &key {
            self.0.keys.push(key.clone());
            self.0.told.insert(key.clone(), 1);
        }
        self.0.effects.push(Effect { worker, what, event, key });
    }

    fn differences(&self) -> Vec<Difference> {
        check(&self.0, DEADLINE).differences
    }
}

fn address(sign_up: u64) -> String {
    format!("guest-{sign_up}@contoso.example")
}

fn event(number: u64) -> Uuid {
    Uuid::from_u128(u128::from(number) + 1)
}

fn answers() -> impl Strategy<Value = Vec<Answer>> {
    let answer = prop_oneof![
        6 => Just(Answer::Continue),
        1 => Just(Answer::Block),
        1 => Just(Answer::ValidationError),
        1 => Just(Answer::TryAgain),
    ];
    prop::collection::vec(answer, 1..40)
}

/// Which sign-ups were accepted.
fn accepted(answers: &[Answer]) -> Vec<u64> {
    let numbered = answers.iter().enumerate();
    numbered.filter(|(_, it)| **it == Answer::Continue).map(|(number, _)| number as u64).collect()
}

proptest! {
    #[test]
    fn a_run_without_a_fault_has_no_difference(answers in answers()) {
        prop_assert_eq!(Story::of(&answers).differences(), vec![]);
    }

    #[test]
    fn an_event_that_is_lost_is_missed(answers in answers(), which: prop::sample::Index) {
        let accepted = accepted(&answers);
        prop_assume!(!accepted.is_empty());
        let sign_up = *which.get(&accepted);
        let mut story = Story::of(&answers);

        story.0.events.retain(|it| it.id != event(sign_up));

        let missed = Difference::NoEvent { sign_up, step: Step::BeforeCreate };
        let orphans = WANTED.map(|(worker, effect)| {
            Difference::EffectOfNoEvent { event: event(sign_up), worker, effect }
        });
        let mut expected = vec![missed];
        expected.extend(orphans);
        expected.sort();
        prop_assert_eq!(story.differences(), expected);
    }

    #[test]
    fn one_effect_less_or_more_is_noticed_and_a_parked_letter_makes_up_for_one_less(
        answers in answers(), which: prop::sample::Index, part in 0_usize..WANTED.len()
    ) {
        let accepted = accepted(&answers);
        prop_assume!(!accepted.is_empty());
        let id = event(*which.get(&accepted));
        let (worker, effect) = WANTED[part];

        let mut twice = Story::of(&answers);
        twice.effect(worker, effect, id);
        let found = Difference::SeveralEffects { event: id, worker, effect, found: 2 };
        prop_assert_eq!(twice.differences(), vec![found]);

        let mut never = Story::of(&answers);
        never.0.effects.retain(|it| (it.worker, it.what, it.event) != (worker, effect, id));
        let missed = Difference::NoEffect { event: id, worker, effect };
        prop_assert_eq!(never.differences(), vec![missed]);

        let mut parked = Story::of(&answers);
        parked.0.effects.retain(|it| (it.worker, it.event) != (worker, id));
        parked.0.parked.push((worker, id));
        prop_assert_eq!(parked.differences(), vec![]);

        let mut both = Story::of(&answers);
        both.0.parked.push((worker, id));
        let is_both = Difference::DoneAndParked { event: id, worker };
        prop_assert!(both.differences().contains(&is_both));
    }
}

#[test]
fn a_call_that_nobody_answered_may_have_made_its_event_but_not_two() {
    let mut story = Story::default();
    story.call(0, 0, 0);
    story.0.journal.push(Entry::NotAnswered { call: 0, at: 5_000_000 });
    assert_eq!(story.differences(), vec![]);

    story.event(0, 0, "accepted");
    assert_eq!(story.differences(), vec![]);

    story.event(1, 0, "accepted");
    let events = vec![event(0), event(1)];
    let several = Difference::SeveralEvents { sign_up: 0, step: Step::BeforeCreate, events };
    assert_eq!(story.differences(), vec![several]);
}

#[test]
fn one_event_that_is_stored_twice_is_noticed() {
    let mut story = Story::of(&[Answer::Block]);
    story.0.events.push(story.0.events[0].clone());

    let events = vec![event(0), event(0)];
    let twice = Difference::SeveralEvents { sign_up: 0, step: Step::BeforeCreate, events };
    assert_eq!(story.differences(), vec![twice]);
}

#[test]
fn an_event_that_says_otherwise_and_one_that_nobody_asked_for_are_noticed() {
    let mut story = Story::of(&[Answer::Block]);
    story.0.events[0].kind = "rejected".to_owned();
    let (sign_up, step) = (0, Step::BeforeCreate);
    let contradicts = Difference::EventContradicts { sign_up, step, event: event(0) };
    assert_eq!(story.differences(), vec![contradicts]);

    let mut story = Story::of(&[Answer::Block]);
    story.event(7, 7, "blocked");
    assert_eq!(story.differences(), vec![Difference::EventOfNoCall { event: event(7) }]);
}

#[test]
fn a_repeated_call_must_be_answered_alike_but_may_get_through_after_a_try_again() {
    let repeated = |first, then| {
        let mut story = Story::of(&[then]);
        story.call(9, 0, QUICK * 2);
        story.answer(9, QUICK * 3, first);
        story.differences()
    };

    assert_eq!(repeated(Answer::Continue, Answer::Continue), vec![]);
    assert_eq!(repeated(Answer::TryAgain, Answer::Continue), vec![]);
    let (sign_up, step) = (0, Step::BeforeCreate);
    let differ = Difference::AnswersDiffer { sign_up, step };
    assert!(repeated(Answer::Block, Answer::Continue).contains(&differ));
    let unknown = Difference::NotOfTheContract { sign_up, step, status: 200 };
    assert_eq!(repeated(Answer::Unknown, Answer::Continue), vec![unknown]);
}

#[test]
fn an_answer_is_late_unless_a_fault_or_this_machine_held_it_up() {
    let took = DEADLINE + GRACE + Duration::from_millis(1);
    let late = |also: Option<Entry>| {
        let mut story = Story::default();
        story.call(0, 0, 0);
        story.answer(0, micros(took), Answer::Continue);
        story.event(0, 0, "accepted");
        story.0.journal.extend(also);
        story.differences()
    };
    let is_late = vec![Difference::Late { sign_up: 0, step: Step::BeforeCreate, took }];

    assert_eq!(late(None), is_late);
    let kept = |from, until| Entry::Kept { from, until, by: "stop connector".to_owned() };
    assert_eq!(late(Some(kept(10, 20))), vec![]);
    assert_eq!(late(Some(kept(2_000_000, 3_000_000))), is_late, "it was over by then");
    assert_eq!(late(Some(Entry::Stalled { from: 0, until: 1_000 })), vec![]);
    assert_eq!(late(Some(Entry::Stalled { from: 0, until: 999 })), is_late, "too short");
}

#[test]
fn what_waits_still_and_what_the_target_knows_otherwise_is_noticed() {
    let id = event(0);
    let mut story = Story::of(&[Answer::Continue]);
    story.0.waiting.push((Worker::Notify, id));
    let waits = Difference::StillWaiting { event: id, worker: Worker::Notify };
    assert_eq!(story.differences(), vec![waits]);

    let mut story = Story::of(&[Answer::Continue]);
    story.0.told.clear();
    let never = |worker| Difference::NeverTold { event: id, worker };
    assert_eq!(story.differences(), [Worker::Notify, Worker::Hook, Worker::Script].map(never));

    let mut story = Story::of(&[Answer::Continue]);
    story.0.told.insert("other".to_owned(), 1);
    let key = "other".to_owned();
    assert_eq!(story.differences(), vec![Difference::ToldOfNoEvent { key }]);
}

#[test]
fn what_is_told_twice_under_its_key_is_only_counted() {
    let mut story = Story::of(&[Answer::Continue]);
    story.0.told.values_mut().for_each(|times| *times = 3);

    let verdict = check(&story.0, DEADLINE);

    assert_eq!(verdict.differences, vec![]);
    assert_eq!(verdict.counts["told again under their key"], 6);
}
