//! What the store promises, tried on both dialects, and what each dialect promises beyond that.

mod accounts;
mod contract;
mod home;
mod postgres;
mod sqlite;

/// Runs every test of the contract against a fresh database of each dialect.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod on_sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() -> anyhow::Result<()> {
                let home = crate::home::Home::sqlite()?;
                crate::contract::$name(&home).await
            })*
        }

        mod on_postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() -> anyhow::Result<()> {
                let home = crate::home::Home::postgres().await?;
                crate::contract::$name(&home).await
            })*
        }
    };
}

on_both![
    a_sign_up_makes_a_person_with_the_claims_as_decided,
    the_same_event_from_many_tasks_has_one_effect,
    events_of_one_person_are_all_counted_and_the_newest_stays,
    a_late_older_event_is_counted_and_changes_nothing_else,
    a_sign_up_is_recorded_once_whoever_records_it,
    a_set_of_grants_may_be_empty_and_still_counts,
    a_late_older_event_does_not_change_a_grant,
    a_notification_keeps_its_key_until_it_was_sent,
    channels_are_independent_of_each_other,
    a_recorded_notification_is_kept_once,
    an_event_is_done_once_for_each_worker,
    failed_attempts_are_counted_for_each_worker,
    a_dead_letter_is_kept_once,
    effects_are_told_for_any_number_of_events,
    what_a_platform_may_send_is_kept,
    giving_up_in_the_middle_leaves_all_or_nothing,
    migrating_at_once_applies_everything_once,
    a_newer_database_is_current,
    a_database_without_tables_is_misconfigured,
    refused_data_is_not_in_the_error,
];
