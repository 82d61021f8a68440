//! What the store promises, tried on both dialects, and what each dialect promises beyond that.

mod accounts;
mod approvals;
mod confirmations;
mod contract;
mod devices;
mod grant_targets;
mod home;
mod letters;
mod pausing;
mod postgres;
mod random;
mod removal;
mod retries;
mod sqlite;

/// Runs every test of each suite against a fresh database of each dialect.
macro_rules! on_both {
    ($($suite:ident { $($name:ident),* $(,)? })*) => {
        mod on_sqlite {
            $(mod $suite {
                $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() -> anyhow::Result<()> {
                    let home = crate::home::Home::sqlite()?;
                    crate::$suite::$name(&home).await
                })*
            })*
        }

        mod on_postgres {
            $(mod $suite {
                $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() -> anyhow::Result<()> {
                    let home = crate::home::Home::postgres().await?;
                    crate::$suite::$name(&home).await
                })*
            })*
        }
    };
}

on_both! {
    contract {
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
        effects_are_told_for_any_number_of_events,
        what_a_platform_may_send_is_kept,
        giving_up_in_the_middle_leaves_all_or_nothing,
        migrating_at_once_applies_everything_once,
        a_newer_database_is_current,
        a_database_without_tables_is_misconfigured,
        refused_data_is_not_in_the_error,
    }
    removal {
        nothing_waits_for_a_worker_that_was_removed,
        a_worker_added_again_is_given_what_the_former_has_done_or_given_up,
    }
    approvals {
        a_request_is_opened_once_and_keeps_the_sign_up_as_it_came,
        a_further_attempt_is_noted_and_changes_nothing_else,
        attempts_at_once_open_one_request,
        of_many_approvers_at_once_one_decides,
        a_decision_waits_in_the_outbox_until_it_is_published,
        the_same_decision_again_is_still_the_decision,
        a_request_expires_at_its_end_and_not_before,
        deciding_and_expiring_at_once_have_one_outcome,
        giving_up_in_the_middle_leaves_no_decision_without_its_event,
        who_was_denied_may_apply_again,
        what_happened_before_a_decision_is_settled_by_it,
        an_approval_lasts,
        an_attempt_noted_once_stays_where_it_is,
        requests_are_listed_page_by_page_the_newest_first,
        a_request_is_found_by_the_beginning_of_its_id,
        what_is_no_decision_decides_nothing,
        what_became_of_a_sign_up_changes_the_person_and_is_no_sign_up,
        a_database_of_the_version_before_is_brought_up_to_date,
    }
    confirmations {
        a_sign_up_waits_until_it_is_due_and_is_confirmed_once,
        a_token_confirms_whoever_waits_and_whoever_comes_later,
        of_several_sign_ups_of_a_person_the_newest_waits,
        sign_ups_at_once_leave_the_newest_waiting,
        of_all_who_settle_a_sign_up_at_once_one_does,
        giving_up_in_the_middle_leaves_no_outcome_without_its_event,
        what_is_no_outcome_settles_nothing,
        one_that_cannot_be_read_holds_up_no_other,
        however_many_older_ones_begin_meanwhile_the_newest_waits,
        what_was_said_at_the_sign_up_is_kept_while_it_waits_only,
    }
    retries {
        a_failed_event_waits_until_it_is_due,
        what_is_due_comes_by_how_long_it_has_been,
        a_lease_is_extended_or_given_back,
        only_failures_that_count_are_counted,
        nothing_brings_back_what_was_settled,
        of_many_that_claim_at_once_each_event_has_one,
        what_is_set_aside_is_counted_for_each_worker,
        a_failure_interrupted_anywhere_has_happened_or_not,
    }
    letters {
        what_happens_to_a_letter_is_kept,
        only_what_is_parked_is_sent_back_at_the_pace_asked_for,
        a_letter_is_dropped_only_with_a_reason,
        what_is_no_event_is_kept_once_for_each_content,
        what_was_no_event_may_be_one_for_this_version,
        letters_are_found_page_by_page_and_group_by_group,
        a_redrive_interrupted_anywhere_has_happened_or_not,
        whatever_happens_at_once_each_letter_has_one_fate,
        letters_of_the_version_before_have_their_history,
    }
    devices {
        a_device_registered_again_is_the_same_one,
        a_removed_device_is_kept_without_its_secrets,
        registered_from_many_places_at_once_it_is_one_device,
        of_many_devices_the_newest_are_reached,
        a_role_is_held_by_whom_it_is_granted_now,
        what_is_sent_to_nobody_any_more_leaves_no_note,
    }
    grant_targets {
        what_is_granted_is_wanted_at_its_targets_until_it_is_seen_there,
        a_row_is_in_one_hand_until_its_lease_is_over,
        what_is_revoked_is_taken_from_its_targets,
        what_expires_is_wanted_no_more,
        what_stems_from_a_sign_up_that_came_to_nothing_is_revoked,
        in_whatever_order_news_come_the_same_roles_are_held,
        what_is_held_because_of_an_older_event_again_is_held_as_that_said,
        a_role_is_wanted_anew_for_another_account,
        a_repair_is_due_at_once,
        rows_and_grants_come_page_by_page,
        a_grant_interrupted_anywhere_is_wanted_at_all_targets_or_none,
    }
    pausing {
        a_worker_is_paused_until_it_is_resumed,
    }
    random {
        whatever_is_done_in_whatever_order_the_store_does_as_a_simple_model,
    }
}
