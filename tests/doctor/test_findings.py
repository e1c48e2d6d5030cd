"""The worst state of several findings, and the number of findings in each state."""

from __future__ import annotations

from megatron_ettin.doctor.findings import count_states, note, ok, problem, worst


def test_worst_of_findings_is_the_most_severe_state() -> None:
    assert worst([]) == "ok"
    assert worst([ok("a", ""), problem("b", "", ""), note("c", "")]) == "problem"


def test_count_states_lists_each_state_from_best_to_worst() -> None:
    assert count_states([problem("a", "", ""), ok("b", ""), ok("c", "")]) == "2 ok, 1 problem"
