"""Broken variants of the SQL functions. Each is one guard less, and names the test that misses it.

`pytest --mutant NAME` runs tests against one of them. An edit is short and stands at the centre of its guard, so that
it survives what happens around it; one whose text is not there exactly once is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Mutant:
    """A variant of one file: what is wrong with it, the edits (old text, new text), and who sees it."""

    name: str
    wrong: str
    file: str
    edits: tuple[tuple[str, str], ...]
    killer: str  # the node id of a test, from tests/sql on

    def sql(self) -> str:
        """The file with the edits. Raises `LookupError` when one does not fit."""
        text = files("commandbus").joinpath("sql", "functions", self.file).read_text("utf-8")
        for old, new in self.edits:
            if (count := text.count(old)) != 1:
                msg = f"mutant {self.name}: {count} times in {self.file}, not once: {old}"
                raise LookupError(msg)
            text = text.replace(old, new)
        return text


_FENCE = "AND c.status = 'IN_PROGRESS' AND c.delivery = i.delivery AND c.lease_token = i.lease_token"
_NAMED = (
    "c.domain = p_domain AND c.status = 'IN_PROGRESS' AND c.command_id IN"
    " (SELECT i.command_id FROM json_to_recordset(p_items::json) AS i(command_id uuid))"
)
_KNOWN = "SELECT FROM commandbus.command_history h WHERE h.domain = g.domain AND h.command_id = g.command_id"
_CELL = "test_transitions.py::test_every_status_times_every_verb"
_STALE = "test_transitions.py::test_a_stale_lease_changes_nothing"

_ALL = (
    # ---------------------------------------------------------------------------------------------- the fence
    Mutant(
        "fence-dropped", "any lease passes", "command.sql",
        ((_FENCE, ""),),
        f"{_STALE}[complete-the lease of before]",
    ),
    Mutant(
        "fence-by-status", "any lease of a running command passes", "command.sql",
        ((_FENCE, "AND c.status = 'IN_PROGRESS'"),),
        f"{_STALE}[complete-the lease of before]",
    ),
    Mutant(
        "fence-by-delivery", "the token is not compared", "command.sql",
        ((_FENCE, "AND c.status = 'IN_PROGRESS' AND c.delivery = i.delivery"),),
        f"{_STALE}[complete-right delivery, wrong token]",
    ),
    Mutant(
        "fence-by-token", "the delivery is not compared", "command.sql",
        ((_FENCE, "AND c.status = 'IN_PROGRESS' AND c.lease_token = i.lease_token"),),
        f"{_STALE}[complete-right token, wrong delivery]",
    ),
    Mutant(
        "fence-without-status", "a lease that was given back still passes", "command.sql",
        ((_FENCE, "AND c.delivery = i.delivery AND c.lease_token = i.lease_token"),),
        f"{_CELL}[complete-PENDING]",
    ),
    Mutant(
        "fence-waits", "a locked row holds up its neighbours", "command.sql",
        (("LIMIT 1 FOR UPDATE SKIP LOCKED) h", "LIMIT 1 FOR UPDATE) h"),),
        "test_races.py::test_a_locked_row_does_not_hold_up_its_neighbours",
    ),
    Mutant(
        "fence-waits-unordered", "and bulk calls lock in the order of the caller", "command.sql",
        (("LIMIT 1 FOR UPDATE SKIP LOCKED) h", "LIMIT 1 FOR UPDATE) h"), ("ORDER BY i.command_id) i", ") i")),
        "test_races.py::test_bulk_verbs_in_any_order_do_not_deadlock",
    ),
    Mutant(
        "named-twice", "a command may be named twice in a call", "command.sql",
        (("count(*) = count(DISTINCT i.command_id)", "true"),),
        "test_transitions.py::test_a_command_is_named_once_in_a_call[stale first-complete]",
    ),
    Mutant(
        "renew-unfenced", "a renewal needs no lease", "lease.sql",
        (("WHERE c.ctid = ANY (v_held) RETURNING c.command_id", f"WHERE {_NAMED} RETURNING c.command_id"),),
        f"{_STALE}[renew-the lease of before]",
    ),
    Mutant(
        "complete-unfenced", "a completion needs no lease", "lease.sql",
        (("_finish(v_held, 'COMPLETED'",
          f"_finish(ARRAY(SELECT c.ctid FROM commandbus.command c WHERE {_NAMED}), 'COMPLETED'"),),
        f"{_STALE}[complete-the lease of before]",
    ),
    Mutant(
        "canceled-says-done", "the worker of a canceled command is told that it is done", "command.sql",
        (("AND h.presented_token = i.lease_token", "AND h.lease_token = i.lease_token"),),
        f"{_CELL}[complete-CANCELED]",
    ),
    Mutant(
        "repeated-says-lost", "a completion that is repeated is told that the lease is lost", "command.sql",
        (("AND h.presented_token = i.lease_token", "AND h.presented_token IS NULL"),),
        f"{_CELL}[complete-COMPLETED]",
    ),
    # ------------------------------------------------------------------------------------------------ batches
    Mutant(
        "batch-not-counted", "the end of a command is not counted in its batch", "command.sql",
        (("IF v_batches IS NOT NULL THEN", "IF false THEN"),),
        "test_batches.py::test_each_verb_of_a_worker_counts[complete-completed]",
    ),
    Mutant(
        "batch-keeps-parked", "what an operator takes out of the queue is still counted as parked", "operator.sql",
        (("IF p_command.batch_id IS NOT NULL AND", "IF false AND"),),
        "test_batches.py::test_each_verb_on_a_parked_command_counts[operator_retry-open]",
    ),
    Mutant(
        "batch-parked-uncounted", "a command that is parked stays open in its batch", "lease.sql",
        (("IF v_stuck IS NOT NULL THEN", "IF false THEN"),),
        "test_batches.py::test_each_verb_of_a_worker_counts[fail PERMANENT-in_trouble]",
    ),
    Mutant(
        "batch-crashed-uncounted", "a command that a sweep parks stays open in its batch", "claim.sql",
        (("IF v_stuck IS NOT NULL THEN", "IF false THEN"),),
        "test_batches.py::test_a_sweep_that_parks_counts",
    ),
    Mutant(
        "batch-ends-again", "a batch that has ended ends again", "batch.sql",
        ((" AND t.finished_at IS NULL\n    RETURNING", "\n    RETURNING"),),
        "test_batches.py::test_a_batch_that_grows_does_not_finish",
    ),
    Mutant(
        "batch-ends-growing", "a batch ends while it grows", "batch.sql",
        (("CASE WHEN NOT t.growing\n", "CASE WHEN true\n"),),
        "test_batches.py::test_a_batch_that_grows_does_not_finish",
    ),
    Mutant(
        "batch-late-forgotten", "what waits to be counted is put in by nobody but the next who counts", "claim.sql",
        (("    PERFORM commandbus._settle_all(p_domain);\n", ""),),
        "test_batches.py::test_an_open_transaction_holds_up_nobody_and_the_next_sweep_finishes_the_batch",
    ),
    Mutant(
        "batch-late-left", "who counts leaves what waits", "batch.sql",
        (("IF EXISTS (SELECT FROM commandbus.batch_change w",
          "IF false AND EXISTS (SELECT FROM commandbus.batch_change w"),),
        "test_batches.py::test_who_counts_next_puts_in_what_waits",
    ),
    Mutant(
        "batch-closed-early", "closing does not wait for those who add", "batch.sql",
        (("AND t.batch_id = p_batch_id FOR KEY SHARE;", "AND t.batch_id = p_batch_id;"),),
        "test_batches.py::test_closing_waits_for_what_is_being_added",
    ),
    Mutant(
        "batch-id-taken", "a batch cannot end when somebody has sent what it sends then", "batch.sql",
        (("    ON CONFLICT (domain, command_id) DO NOTHING;", ";"),),
        "test_batches.py::test_a_batch_ends_although_somebody_has_sent_what_it_sends_then[waiting]",
    ),
    Mutant(
        "batch-sends-again", "a batch sends under an id that history knows", "batch.sql",
        (("v_command.data_hash, FOUND);", "v_command.data_hash, FOUND) WHERE NOT FOUND;"),),
        "test_batches.py::test_a_batch_ends_although_somebody_has_sent_what_it_sends_then[ended]",
    ),
    Mutant(
        "batch-fails-claims", "a batch that cannot be counted fails commands and claims", "batch.sql",
        (("    WHEN OTHERS THEN\n", "    WHEN assert_failure THEN\n"),),
        "test_batches.py::test_a_batch_that_cannot_be_counted_fails_no_command_and_no_claim",
    ),
    Mutant(
        "batch-ever-patient", "each command of a call waits anew for who keeps its batch", "batch.sql",
        (("set_config('commandbus.impatient', 'on', true)", "set_config('commandbus.impatient', 'off', true)"),),
        "test_batches.py::test_a_call_for_many_waits_once_for_who_keeps_their_batch[retry]",
    ),
    Mutant(
        "batch-never-patient", "a session that waited in vain once never waits for a batch again", "batch.sql",
        (("set_config('commandbus.impatient', 'on', true)", "set_config('commandbus.impatient', 'on', false)"),),
        "test_batches.py::test_the_next_transaction_waits_again",
    ),
    # ------------------------------------------------------------------------------------------------ sending
    Mutant(
        "send-forgets-history", "an own id is not looked up in history", "send.sql",
        (("IF v_hash IS NULL THEN\n        SELECT h.data_hash",
          "IF v_hash IS NULL AND NOT p_fresh THEN\n        SELECT h.data_hash"),),
        "test_send.py::test_an_own_id_sent_again[again0-duplicate-COMPLETED]",
    ),
    Mutant(
        "send-looks-first", "an own id is looked up in history by the statement that inserts it", "send.sql",
        (("IF v_hash IS NULL THEN\n        SELECT h.data_hash",
          "IF v_hash IS NULL AND NOT p_fresh THEN\n        SELECT h.data_hash"),
         ("FROM given g WHERE g.wrong IS NULL",
          f"FROM given g WHERE g.wrong IS NULL AND NOT EXISTS ({_KNOWN})")),
        "test_races.py::test_who_waits[True-IN_PROGRESS-complete-send again-duplicate-COMPLETED-duplicate-IN_PROGRESS]",
    ),
    Mutant(
        "send-keeps-both", "an id that history knows is left in the queue too", "send.sql",
        (("DELETE FROM commandbus.command c WHERE c.domain = p_domain AND c.command_id = p_id;", "NULL;"),),
        "test_send.py::test_an_own_id_sent_again[again0-duplicate-COMPLETED]",
    ),
    Mutant(
        "send-at-any-level", "an own id is accepted above READ COMMITTED", "send.sql",
        (("NOT IN ('read committed', 'read uncommitted')", "= 'none'"),),
        "test_send.py::test_an_own_id_above_read_committed[absent-REPEATABLE READ]",
    ),
    Mutant(
        "send-never-conflicts", "other data under a known id is a duplicate", "send.sql",
        (("CASE WHEN v_hash = p_hash THEN", "CASE WHEN true THEN"),),
        "test_send.py::test_an_own_id_sent_again[again2-conflict-PENDING]",
    ),
    Mutant(
        "send-compares-edited-data", "a duplicate is what equals the data of now", "send.sql",
        (("SELECT c.data_hash INTO v_hash",
          "SELECT sha256(convert_to(c.command_type || ' ' || c.data::text, 'UTF8')) INTO v_hash"),),
        "test_send.py::test_what_counts_is_what_was_first_sent[False]",
    ),
    Mutant(
        "send-again-writes-nothing", "a duplicate is acknowledged before its first is with the standby", "send.sql",
        (("PERFORM pg_logical_emit_message(true, 'commandbus', '');", "NULL;"),),
        "test_send.py::test_a_duplicate_is_as_durable_as_what_is_accepted[PENDING]",
    ),
    Mutant(
        "send-unordered", "ids are locked in the order of the caller", "send.sql",
        (("ORDER BY g.domain, g.command_id, g.n", "ORDER BY g.n"),),
        "test_send.py::test_senders_of_the_same_ids_in_any_order_do_not_deadlock",
    ),
    Mutant(
        "clock-stands-still", "the clock stands still in a transaction", "command.sql",
        (("RETURN clock_timestamp();", "RETURN now();"),),
        "test_clock_and_codes.py::test_time_goes_on_within_a_transaction",
    ),
    Mutant(
        "clock-open-to-all", "every session may shift its clock", "command.sql",
        (("s.name = 'test_clock' AND s.value = 'on'", "s.name = 'test_clock'"),),
        "test_clock_and_codes.py::test_nobody_shifts_a_clock_that_is_closed[off-claim]",
    ),
    # ----------------------------------------------------------------------------------------------- claiming
    Mutant(
        "claim-again", "a running command is claimed again", "claim.sql",
        (("AND q.place <= s.up_to AND q.status = 'PENDING' AND q.ctid", "AND q.place <= s.up_to AND q.ctid"),),
        "test_claim.py::test_types_are_merged_by_priority_then_by_sending[2]",
    ),
    Mutant(
        "claim-waits", "a claim waits for what another claims", "claim.sql",
        (("LIMIT least(s.share, p_limit - cardinality(v_held)) FOR UPDATE SKIP LOCKED",
          "LIMIT least(s.share, p_limit - cardinality(v_held)) FOR UPDATE"),),
        "test_races.py::test_who_does_not_wait[True-PENDING-claim-claim-0-0-1]",
    ),
    Mutant(
        "claim-keeps-token", "the next lease has the token of the last", "claim.sql",
        (("lease_token = gen_random_uuid()", "lease_token = coalesce(c.lease_token, gen_random_uuid())"),),
        f"{_STALE}[complete-right delivery, wrong token]",
    ),
    Mutant(
        "claim-keeps-delivery", "deliveries are not counted", "claim.sql",
        (("delivery = c.delivery + 1", "delivery = greatest(c.delivery, 1)"),),
        f"{_STALE}[complete-right token, wrong delivery]",
    ),
    Mutant(
        "claim-leaves-no-mark", "what is claimed is not marked for the search of expired leases", "claim.sql",
        (("PERFORM commandbus._mark(p_domain, v_held);", "NULL;"),),
        "test_claim.py::test_every_expired_lease_is_found_whatever_its_type_and_priority",
    ),
    Mutant(
        "priority-ignored", "priorities do not count", "command.sql",
        (("((100 - p_priority)::bigint << 54)", "((100 - 0 * p_priority)::bigint << 54)"),),
        "test_send.py::test_a_higher_priority_comes_first",
    ),
    Mutant(
        "promote-early", "what is scheduled is promoted before it is due", "claim.sql",
        (("q.due_at <= v_now", "q.due_at IS NOT NULL"),),
        "test_budgets.py::test_back_off_starts_now",
    ),
    Mutant(
        "promote-unbounded", "everything that is due is promoted in one call", "claim.sql",
        (("ORDER BY q.due_at LIMIT 500 FOR", "ORDER BY q.due_at FOR"),),
        "test_claim.py::test_at_most_500_are_promoted_in_a_call",
    ),
    # ------------------------------------------------------------------------------------------------ replies
    Mutant(
        "reply-missing", "what ends sends no reply", "command.sql",
        (("PERFORM commandbus._reply(v_domain, v_asked, v_now);", "NULL;"),),
        "test_replies.py::test_a_verdict_that_ends_sends_a_reply_to_each_that_asked[complete]",
    ),
    Mutant(
        "reply-twice", "what ends sends two replies", "command.sql",
        (("PERFORM commandbus._reply(v_domain, v_asked, v_now);",
          "PERFORM commandbus._reply(v_domain, v_asked, v_now, t.at) FROM (VALUES (v_now), (now())) t (at);"),),
        "test_replies.py::test_a_verdict_that_ends_sends_a_reply_to_each_that_asked[complete]",
    ),
    Mutant(
        "reply-tells-nobody", "a bus that waits is not told", "command.sql",
        (("PERFORM commandbus._tell_waiting(v_awaited, v_address);", "NULL;"),),
        "test_replies.py::test_a_bus_is_told_the_ids_of_its_own",
    ),
    Mutant(
        "outcome-of-the-unfinished", "what goes on is said to have ended", "reply.sql",
        (("f.status IN ('COMPLETED', 'FAILED', 'CANCELED')", "f.status <> 'IN_TROUBLESHOOTING_QUEUE'"),),
        "test_replies.py::test_outcomes_are_of_what_has_ended_and_of_the_parked_if_asked",
    ),
    # ------------------------------------------------------------------------------------------------ crashes
    Mutant(
        "sweep-takes-the-living", "leases that last are swept too", "claim.sql",
        (("AND q.place <= m.place AND q.status = 'IN_PROGRESS' AND q.lease_until < v_now",
          "AND q.place <= m.place AND q.status = 'IN_PROGRESS'"),),
        "test_transitions.py::test_a_renewed_lease_lasts_from_now",
    ),
    Mutant(
        "crash-not-counted", "a crash costs nothing", "claim.sql",
        (("SET crashes = c.crashes + CASE", "SET crashes = c.crashes + 0 * CASE"),),
        "test_budgets.py::test_the_first_crash_is_claimed_as_before",
    ),
    Mutant(
        "crash-limit-four", "the fourth crash parks, not the third", "claim.sql",
        (("status = CASE WHEN c.crashes < 2 THEN", "status = CASE WHEN c.crashes < 3 THEN"),
         ("alone_since = CASE WHEN c.crashes = 1 THEN", "alone_since = CASE WHEN c.crashes IN (1, 2) THEN"),
         ("parked_at = CASE WHEN c.crashes >= 2 THEN", "parked_at = CASE WHEN c.crashes >= 3 THEN")),
        "test_budgets.py::test_the_third_crash_parks",
    ),
    Mutant(
        "crash-never-alone", "what crashed twice runs beside others", "claim.sql",
        (("place = CASE WHEN c.crashes < 1 THEN", "place = CASE WHEN c.crashes < 2 THEN"),
         ("alone_since = CASE WHEN c.crashes = 1 THEN", "alone_since = CASE WHEN c.crashes < 0 THEN")),
        "test_budgets.py::test_after_the_second_crash_it_runs_alone",
    ),
    Mutant(
        "crash-untold", "a crash leaves no event", "claim.sql",
        (("FROM crashed c\n    )", "FROM crashed c WHERE false\n    )"),),
        "test_budgets.py::test_the_first_crash_is_claimed_as_before",
    ),
    # -------------------------------------------------------------------------------------------- looking ahead
    Mutant(
        "ahead-charged", "what waited in a dead worker has crashed", "claim.sql",
        (("CASE WHEN c.ahead THEN 0 ELSE 1 END", "1"),),
        "test_look_ahead.py::test_what_waited_in_a_dead_worker_is_not_charged",
    ),
    Mutant(
        "ahead-untold", "what ran out uncharged is told as a crash", "claim.sql",
        (("CASE WHEN c.ahead THEN 'EXPIRED' ELSE 'CRASHED' END", "'CRASHED'"),),
        "test_look_ahead.py::test_what_waited_in_a_dead_worker_is_not_charged",
    ),
    Mutant(
        "ahead-all", "what starts at once is not charged either", "claim.sql",
        (("v_ahead := v_held[p_limit - p_ahead + 1:]", "v_ahead := v_held"),),
        "test_look_ahead.py::test_what_waited_in_a_dead_worker_is_not_charged",
    ),
    Mutant(
        "ahead-by-type", "what starts is not the first by place", "claim.sql",
        (("row_number() OVER (ORDER BY c.place)", "row_number() OVER (ORDER BY c.command_type, c.place)"),),
        "test_look_ahead.py::test_what_starts_are_the_first_by_place_whatever_their_types",
    ),
    Mutant(
        "ahead-again", "a command may run out uncharged again and again", "claim.sql",
        (("n.n > p_start AND n.delivery > 0", "false"),),
        "test_look_ahead.py::test_what_kills_its_process_as_soon_as_it_is_claimed_is_parked_after_one_delivery_more",
    ),
    # ----------------------------------------------------------------------------------------------- verdicts
    Mutant(
        "attempts-one-more", "one attempt more than allowed", "lease.sql",
        (("AND c.attempts + 1 < coalesce", "AND c.attempts < coalesce"),),
        "test_budgets.py::test_attempts_are_limited_by_the_command_then_by_the_policy[2-5-2]",
    ),
    Mutant(
        "max-attempts-ignored", "the command's own limit does not count", "lease.sql",
        (("coalesce(c.max_attempts, i.max_attempts)", "i.max_attempts"),),
        "test_budgets.py::test_attempts_are_limited_by_the_command_then_by_the_policy[2-5-2]",
    ),
    Mutant(
        "completion-no-attempt", "a verdict that finishes is no attempt", "command.sql",
        (("CASE WHEN i.lease_token IS NULL THEN 0 ELSE 1 END", "0"),),
        "test_budgets.py::test_a_verdict_that_finishes_is_an_attempt[complete-1]",
    ),
    Mutant(
        "release-charges", "a release costs an attempt", "lease.sql",
        (("SET status = 'PENDING', events", "SET status = 'PENDING', attempts = c.attempts + 1, events"),),
        "test_budgets.py::test_a_release_charges_nothing_and_goes_to_the_end_of_the_line",
    ),
    Mutant(
        "release-keeps-place", "what is released is the next to be claimed", "lease.sql",
        (("CASE WHEN c.crashes < 2 THEN commandbus._place(c.priority) END", "c.place"),),
        "test_budgets.py::test_a_release_charges_nothing_and_goes_to_the_end_of_the_line",
    ),
    Mutant(
        "events-left-behind", "events do not move to history with their command", "command.sql",
        (("FILTER (WHERE m.events > 0)", "FILTER (WHERE false)"),),
        "test_history.py::test_events_move_and_leave_with_their_command",
    ),
    # ---------------------------------------------------------------------------------------------- decisions
    Mutant(
        "decide-in-any-status", "people's verbs do not look at the status", "operator.sql",
        (("v_status <> ALL (p_from)", "v_status <> ALL (p_from) AND v_command.status IS NULL"),),
        f"{_CELL}[operator_retry-IN_PROGRESS]",
    ),
    Mutant(
        "decide-unlocked", "people's verbs do not lock the row that they look at", "operator.sql",
        (("AND c.command_id = p_command_id FOR UPDATE", "AND c.command_id = p_command_id"),),
        "test_races.py::test_who_waits[True-IN_TROUBLESHOOTING_QUEUE-operator_retry-operator_cancel-CB003-PENDING-ok-CANCELED]",
    ),
    Mutant(
        "decide-without-name", "an operator needs no name", "operator.sql",
        (("coalesce(p_operator, '') = ''", "false"),),
        "test_budgets.py::test_an_operator_has_a_name[None-operator_retry]",
    ),
    Mutant(
        "retry-keeps-attempts", "an operator's retry gives no new attempts", "operator.sql",
        (("attempts = 0, crashes = 0", "crashes = 0"),),
        "test_budgets.py::test_operator_retry_gives_all_attempts_again",
    ),
    Mutant(
        "retry-keeps-crashes", "an operator's retry gives no new crashes", "operator.sql",
        (("attempts = 0, crashes = 0", "attempts = 0"),),
        "test_budgets.py::test_operator_retry_gives_a_full_budget[None]",
    ),
    Mutant(
        "retry-counts-from-one", "an operator's retry begins the deliveries anew", "operator.sql",
        (("attempts = 0, crashes = 0", "attempts = 0, crashes = 0, delivery = 0"),),
        "test_budgets.py::test_operator_retry_gives_a_full_budget[None]",
    ),
    Mutant(
        "edit-untold", "the trail does not keep what an operator edited", "operator.sql",
        (("CASE WHEN v_data IS NOT NULL THEN jsonb_build_object", "CASE WHEN false THEN jsonb_build_object"),),
        'test_budgets.py::test_operator_retry_gives_a_full_budget[{"n": 2}]',
    ),
    # ---------------------------------------------------------------------------------------------- processes
    Mutant(
        "process-unlocked", "a reply does not lock its process", "process.sql",
        (("t.command_id = p_command_id)\n    FOR UPDATE;", "t.command_id = p_command_id);"),),
        "test_process.py::test_of_two_replies_the_second_waits_for_the_first",
    ),
    Mutant(
        "process-reply-again", "an outcome is applied each time that it is told", "process.sql",
        (("t.command_id = p_command_id AND t.status = 'OPEN' RETURNING", "t.command_id = p_command_id RETURNING"),),
        "test_process.py::test_a_reply_that_comes_again_or_from_nowhere_does_nothing",
    ),
    Mutant(
        "process-undo-forwards", "what completed first is undone first", "process.sql",
        (("ORDER BY s.applied DESC LIMIT 1", "ORDER BY s.applied LIMIT 1"),),
        "test_process.py::test_what_completed_last_is_undone_first_one_after_the_other",
    ),
    Mutant(
        "process-undo-unawaited", "undoing does not wait for what is open", "process.sql",
        (("AND s.status = 'OPEN' AND s.kind IN ('step', 'undo')) THEN", "AND false) THEN"),),
        "test_process.py::test_the_first_error_compensates_and_later_ones_change_nothing",
    ),
    Mutant(
        "process-undo-nothing", "what was not done is undone", "process.sql",
        (("CASE WHEN p_status = 'COMPLETED' THEN t.undo", "CASE WHEN true THEN t.undo"),),
        "test_process.py::test_what_nobody_runs_is_canceled_when_compensation_begins",
    ),
    Mutant(
        "process-running-canceled", "compensation cancels what a worker runs", "process.sql",
        (("s.command_id, false, p_operator", "s.command_id, true, p_operator"),),
        "test_process.py::test_the_first_error_compensates_and_later_ones_change_nothing",
    ),
    Mutant(
        "process-undo-unchecked", "an undo may be larger than what is sent", "process.sql",
        (("AND NOT commandbus._in_bounds(i.undo", "AND false AND NOT commandbus._in_bounds(i.undo"),),
        "test_process.py::test_an_undo_that_could_not_be_sent_is_refused_with_its_step",
    ),
    Mutant(
        "process-undo-refused", "an undo that was accepted may be refused", "process.sql",
        (("IF p_items #>> '{0,kind}' = 'undo' THEN", "IF false THEN"),),
        "test_process.py::test_an_undo_is_sent_as_it_was_given_whatever_is_allowed_by_now",
    ),
    Mutant(
        "process-reply-stays-parked", "a parked reply holds up compensation", "process.sql",
        (("WHERE q.domain = p.domain AND q.parked_at IS NOT NULL", "WHERE false AND q.domain = p.domain"),),
        "test_process.py::test_a_parked_reply_shows_and_does_not_hold_up_compensation[by an operator]",
    ),
    Mutant(
        "process-failed-undo", "a failed undo is not told", "process.sql",
        (("AND s.kind = 'undo' AND s.status <> 'COMPLETED') THEN 'FAILED'", "AND false) THEN 'FAILED'"),),
        "test_process.py::test_an_undo_that_fails_holds_up_no_other[refuse]",
    ),
    Mutant(
        "process-deadline-stays", "the deadline of a step outlives it", "process.sql",
        (("PERFORM commandbus._stop_timers(p, '{deadline}', 'its step has ended', s.number);", ""),),
        "test_process.py::test_all_timers_go_with_their_step",
    ),
    Mutant(
        "process-ends-early", "it finishes while a step is open", "process.sql",
        (("AND s.kind IN ('step', 'wait')) THEN", "AND v_result IS NULL AND s.kind IN ('step', 'wait')) THEN"),),
        "test_process.py::test_it_finishes_when_no_step_is_open",
    ),
    Mutant(
        "process-waits-for-ever", "a class may say nothing", "process.sql",
        (("        IF v_result IS NULL THEN", "        IF false THEN"),),
        "test_process.py::test_what_would_wait_for_ever_is_refused",
    ),
    Mutant(
        "process-reply-stays-lost", "a reply that was canceled is not sent again", "process.sql",
        (("ELSIF NOT FOUND AND s.finished_at IS NOT NULL THEN", "ELSIF false THEN"),),
        "test_process.py::test_retry_lets_it_go_on[a canceled reply]",
    ),
    Mutant(
        "process-kept-for-ever", "processes outlive their retention", "partitions.sql",
        (("WHERE p.finished_at < v_oldest", "WHERE false"),),
        "test_process.py::test_finished_processes_leave_when_their_retention_is_over",
    ),
    # ---------------------------------------------------------------------------------------------- retention
    Mutant(
        "portion-unbounded", "a batch leaves with all its list in one call, however long it is", "partitions.sql",
        ((" LIMIT v_left));", "));"),),
        "test_retention.py::test_a_large_batch_leaves_in_portions",
    ),
    Mutant(
        "portion-waits", "retention waits for who keeps a batch", "partitions.sql",
        (("ORDER BY b.finished_at FOR UPDATE SKIP LOCKED", "ORDER BY b.finished_at FOR UPDATE"),),
        "test_retention.py::test_what_somebody_keeps_is_passed_over",
    ),
)  # fmt: skip

MUTANTS = {mutant.name: mutant for mutant in _ALL}
