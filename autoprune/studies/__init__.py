"""The search: samplers within the budget, studies that survive a crash, and the ladder of rungs.

Decides which policies are tried and in what order. Sole owner of Optuna; must not know how a policy is evaluated,
recorded or shown.
"""

from autoprune.studies.audit import Audit, audit, kendall_tau
from autoprune.studies.background import read_background, write_background
from autoprune.studies.events import Event, RungFinished, RungStarted, TrialFinished
from autoprune.studies.jobs import CANCELLED, DONE, FAILED, QUEUED, RUNNING, UNFINISHED, Job, Queue, Request
from autoprune.studies.ladder import LadderOutcome, LadderPlan, RungPlan, hold_search, promoted, run_ladder
from autoprune.studies.lease import hold, is_running
from autoprune.studies.notes import (
    read_facts,
    read_measured,
    read_pick,
    write_facts,
    write_measured,
    write_notes,
    write_pick,
    write_study_note,
)
from autoprune.studies.projection import Projector, project
from autoprune.studies.records import (
    Failure,
    StoredTrial,
    distinct,
    read_failures,
    read_results,
    read_trials,
)
from autoprune.studies.retrying import LastingStorage
from autoprune.studies.sampler import SAMPLERS, BudgetSampler, make_sampler, params_of, policy_of, search_space
from autoprune.studies.state import (
    SearchState,
    finished_trials,
    search_holder,
    search_state,
    write_complete,
    write_current,
    write_objective,
    write_total,
)
from autoprune.studies.storage import open_storage, quiet_optuna, same_database, split_password
from autoprune.studies.study import (
    StudySummary,
    check_settings,
    load_rung,
    open_study,
    reference_point,
    rung_names,
    search_names,
    study_name,
    study_summary,
)

__all__ = [
    "CANCELLED",
    "DONE",
    "FAILED",
    "QUEUED",
    "RUNNING",
    "SAMPLERS",
    "UNFINISHED",
    "Audit",
    "BudgetSampler",
    "Event",
    "Failure",
    "Job",
    "LadderOutcome",
    "LadderPlan",
    "LastingStorage",
    "Projector",
    "Queue",
    "Request",
    "RungFinished",
    "RungPlan",
    "RungStarted",
    "SearchState",
    "StoredTrial",
    "StudySummary",
    "TrialFinished",
    "audit",
    "check_settings",
    "distinct",
    "finished_trials",
    "hold",
    "hold_search",
    "is_running",
    "kendall_tau",
    "load_rung",
    "make_sampler",
    "open_storage",
    "open_study",
    "params_of",
    "policy_of",
    "project",
    "promoted",
    "quiet_optuna",
    "read_background",
    "read_facts",
    "read_failures",
    "read_measured",
    "read_pick",
    "read_results",
    "read_trials",
    "reference_point",
    "run_ladder",
    "rung_names",
    "same_database",
    "search_holder",
    "search_names",
    "search_space",
    "search_state",
    "split_password",
    "study_name",
    "study_summary",
    "write_background",
    "write_complete",
    "write_current",
    "write_facts",
    "write_measured",
    "write_notes",
    "write_objective",
    "write_pick",
    "write_study_note",
    "write_total",
]
