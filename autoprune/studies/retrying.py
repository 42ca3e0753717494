"""Optuna's database storage, made to outlast a server that goes away and comes back.

Decides which errors mean that the server is away, how long it is waited for, and how a write that may have happened is
not made twice. Knows nothing of what is stored.
"""

from __future__ import annotations

import copy
import datetime
import json
import random
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy
import sqlalchemy.exc
from optuna.distributions import distribution_to_json
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from autoprune.errors import StorageError
from autoprune.studies.reading import frozen_trials

TOKEN = "autoprune.token"
"""System attribute that tells whether a trial which was sent before the connection broke has arrived."""
PATIENCE_SECONDS = 600.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_AWAY = ("08", "57P", "40001", "40P01", "53300")
"""Beginnings of PostgreSQL's codes for what passes: connection errors, a server that stops or starts, deadlocks and too
many connections. Not a full disk (53100)."""

Value = TypeVar("Value")
Say = Callable[[str], None]


def new_token() -> dict[str, str]:
    """Returns the attribute that marks one trial for good."""
    return {TOKEN: uuid.uuid4().hex}


def is_away(error: BaseException) -> bool:
    """Whether an error means that the same call may succeed a little later."""
    if isinstance(error, StorageInternalError):
        return error.__cause__ is not None and is_away(error.__cause__)
    if not isinstance(error, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)):
        return False
    if isinstance(error.orig, sqlite3.Error):
        return False  # SQLite has waited for its busy timeout already; a full disk does not pass
    state = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or state is None or str(state).startswith(_AWAY)


class LastingStorage(RDBStorage):
    """An `RDBStorage` whose calls are repeated while the server is away, and whose writes can be fenced.

    Every public call is one transaction or can be repeated whole. Two cannot, and look first whether the broken attempt
    has arrived: a new trial, by its token, and the end of a trial, by its state.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any], *, shown: str, say: Say | None) -> None:
        """Connects; does not wait for a server that is away from the beginning.

        Args:
            url: The database.
            engine_kwargs: What SQLAlchemy's engine is made with.
            shown: The database's name in messages.
            say: Is told when the server is away and when it is back.
        """
        self.shown = shown
        self.patience = PATIENCE_SECONDS
        """Seconds that a call waits for the server; whoever is about to end lowers it."""
        self._say = say or (lambda text: None)
        self._away = False
        self._told = threading.Lock()
        self._guard: Callable[[Any], None] | None = None
        super().__init__(url, engine_kwargs)
        event.listen(self.scoped_session, "after_flush", self._flushed)
        event.listen(self.scoped_session, "do_orm_execute", self._executes)
        event.listen(self.scoped_session, "before_commit", self._commits)
        event.listen(self.scoped_session, "after_transaction_end", self._ended)

    def again(self, call: Callable[[], Value]) -> Value:
        """Returns what `call` returns; repeats it, with growing pauses, while the server is away.

        Raises:
            StorageError: The server stayed away for `patience` seconds, or the database cannot be written.
        """
        began, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                value = call()
            except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
                if not is_away(error):
                    raise self._fault(error) from error
                if time.monotonic() - began > self.patience:
                    raise StorageError(
                        f"the storage {self.shown} has been away for {self.patience:.0f} s ({_reason(error)});"
                        " the same command resumes once it is back"
                    ) from error
                self._tell(_reason(error))
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2.0 * pause, _LONGEST_PAUSE)
            else:
                if self._away:
                    self._tell(None)
                return value

    @contextmanager
    def fenced(self, guard: Callable[[Any], None]) -> Iterator[None]:
        """Calls `guard` with the connection within every transaction that writes, before it is committed.

        What `guard` raises undoes the transaction.
        """
        self._guard = guard
        try:
            yield
        finally:
            self._guard = None

    def _fault(self, error: Exception) -> Exception:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        if not isinstance(cause, sqlalchemy.exc.OperationalError):
            return error
        return StorageError(f"the storage {self.shown} cannot be used: {_reason(error)}")

    def _tell(self, reason: str | None) -> None:
        with self._told:
            before, self._away = self._away, reason is not None
        if reason is not None and not before:
            self._say(f"the storage {self.shown} is away ({reason}); trying again for up to {self.patience:.0f} s")
        elif reason is None and before:
            self._say("the storage is back; the search goes on")

    # --- the fence: a transaction that has written asks the guard while it still holds its locks ---

    # Once is enough: after a transaction's first write nobody else can take the lease over before it ends.

    def _flushed(self, session: Any, _context: Any) -> None:
        self._ask_guard(session)

    def _executes(self, state: Any) -> None:
        if not state.is_select:
            state.session.info["wrote"] = True

    def _commits(self, session: Any) -> None:
        if session.info.pop("wrote", False):
            self._ask_guard(session)

    def _ask_guard(self, session: Any) -> None:
        if self._guard is not None and not session.info.get("asked", False):
            self._guard(session.connection())
            session.info["asked"] = True

    def _ended(self, session: Any, transaction: Any) -> None:
        if transaction.parent is None:
            session.info.pop("asked", None)
            session.info.pop("wrote", None)

    # --- what cannot simply be repeated ---

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        # Optuna's own method repeats a failed transaction five times without looking whether it has arrived.
        token = None if template_trial is None else template_trial.system_attrs.get(TOKEN)
        tries = 0

        def make() -> FrozenTrial:
            nonlocal tries
            tries += 1
            with _create_scoped_session(self.scoped_session) as session:
                models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)  # numbers are counted
                row = _arrived(session, study_id, token) if tries > 1 and token is not None else None
                if row is None:
                    row = self._get_prepared_new_trial(study_id, template_trial, session)
                return _frozen(row, template_trial)

        return self.again(make)

    def _get_prepared_new_trial(self, study_id: int, template_trial: FrozenTrial | None, session: Any) -> Any:
        # Optuna looks up the trial and an earlier distribution for every parameter: 25 of them cost 100 queries. All
        # trials of our studies have the same space, which the fingerprint stands for, so the rows are simply inserted.
        if template_trial is None:
            return super()._get_prepared_new_trial(study_id, None, session)
        start, end = template_trial.datetime_start, template_trial.datetime_complete
        row: Any = models.TrialModel(
            study_id=study_id, number=None, state=template_trial.state, datetime_start=start, datetime_complete=end
        )
        session.add(row)
        session.flush()  # SQLite's lock is ours from here on: nobody else counts at the same time
        row.number = row.count_past_trials(session)
        params = [
            {
                "trial_id": row.trial_id,
                "param_name": name,
                "param_value": distribution.to_internal_repr(template_trial.params[name]),
                "distribution_json": distribution_to_json(distribution),
            }
            for name, distribution in template_trial.distributions.items()
        ]
        _insert(session, models.TrialParamModel, params)
        _insert_values(session, row.trial_id, template_trial.values)
        _insert_attrs(session, models.TrialUserAttributeModel, row.trial_id, template_trial.user_attrs)
        _insert_attrs(session, models.TrialSystemAttributeModel, row.trial_id, template_trial.system_attrs)
        return row

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        wanted = None if states is None else [state for state in TrialState if state in states]
        included = {trial_id for trial_id in included_trial_ids if trial_id <= trial_id_greater_than}

        def read() -> list[FrozenTrial]:
            with _create_scoped_session(self.scoped_session) as session:
                models.StudyModel.find_or_raise_by_id(study_id, session)
                return frozen_trials(
                    session.connection(), study_id, states=wanted, after=trial_id_greater_than, included=included
                )

        return self.again(read)

    def finish_trial(
        self,
        trial_id: int,
        *,
        values: Sequence[float],
        user_attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any],
    ) -> None:
        """Completes a RUNNING trial with everything that it holds, in one transaction.

        Raises:
            UpdateFinishedTrialError: It has ended already.
        """
        tries = 0

        def finish() -> None:
            nonlocal tries
            tries += 1
            if tries > 1 and self._ended_so(trial_id, TrialState.COMPLETE, values):
                return
            with _create_scoped_session(self.scoped_session) as session:
                row: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
                self.check_trial_is_updatable(trial_id, row.state)
                row.state, row.datetime_complete = TrialState.COMPLETE, datetime.datetime.now()
                _insert_values(session, trial_id, values)
                _insert_attrs(session, models.TrialUserAttributeModel, trial_id, user_attrs, replace=True)
                _insert_attrs(session, models.TrialSystemAttributeModel, trial_id, system_attrs, replace=True)

        self.again(finish)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Sets a trial's state, once; an end that has arrived although the connection broke is not set again."""
        put = super().set_trial_state_values
        tries = 0

        def end() -> bool:
            nonlocal tries
            tries += 1
            try:
                return put(trial_id, state, values)
            except UpdateFinishedTrialError:
                if tries == 1 or not self._ended_so(trial_id, state, values):
                    raise
                return True

        return self.again(end)

    def _ended_so(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        trial = RDBStorage.get_trial(self, trial_id)
        return trial.state == state and (values is None or list(trial.values) == list(values))


@contextmanager
def hurried(study: Study, *, seconds: float = 5.0) -> Iterator[None]:
    """Lets calls to the study's storage wait for no more than `seconds` for a server that is away."""
    backend = getattr(study._storage, "_backend", None)
    if not isinstance(backend, LastingStorage):
        yield
        return
    before = backend.patience
    backend.patience = min(before, seconds)
    try:
        yield
    finally:
        backend.patience = before


def _insert(session: Any, model: Any, rows: list[dict[str, Any]]) -> None:
    if rows:
        session.execute(sqlalchemy.insert(model), rows)


def _insert_values(session: Any, trial_id: int, values: Sequence[float] | None) -> None:
    stored = [models.TrialValueModel.value_to_stored_repr(value) for value in values or ()]
    rows = [
        {"trial_id": trial_id, "objective": objective, "value": value, "value_type": kind}
        for objective, (value, kind) in enumerate(stored)
    ]
    _insert(session, models.TrialValueModel, rows)


def _insert_attrs(session: Any, model: Any, trial_id: int, attrs: Mapping[str, Any], *, replace: bool = False) -> None:
    if replace:
        session.execute(sqlalchemy.delete(model).where(model.trial_id == trial_id, model.key.in_(list(attrs))))
    _insert(session, model, [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in attrs.items()])


def _arrived(session: Any, study_id: int, token: str) -> Any:
    """Returns the trial's row that a broken attempt has left, or None."""
    attribute = models.TrialSystemAttributeModel
    return (
        session.query(models.TrialModel)
        .join(attribute)
        .filter(models.TrialModel.study_id == study_id)
        .filter(attribute.key == TOKEN, attribute.value_json == json.dumps(token))
        .one_or_none()
    )


def _frozen(row: Any, template: FrozenTrial | None) -> FrozenTrial:
    """Returns the trial of a row as Optuna's cache keeps it."""
    if template is not None:
        frozen = copy.copy(template)  # whose dictionaries nobody changes: a deep copy takes 1 ms
        frozen.number, frozen.datetime_start, frozen._trial_id = row.number, row.datetime_start, row.trial_id
        return frozen
    return FrozenTrial(
        number=row.number,
        state=row.state,
        value=None,
        values=None,
        datetime_start=row.datetime_start,
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=row.trial_id,
    )


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    text = str(getattr(cause, "orig", None) or cause)
    return " ".join(text.split())[:200]


def _repeated(name: str) -> Any:
    method = getattr(RDBStorage, name)

    def call(self: LastingStorage, *args: Any, **kwargs: Any) -> Any:
        return self.again(lambda: method(self, *args, **kwargs))

    call.__name__, call.__doc__ = name, method.__doc__
    return call


_REPEATABLE = (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "_set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial_id_from_study_id_trial_number",
    "get_trial",
    "get_trial_user_attrs",
    "get_trial_system_attrs",
    "_get_best_trial_id",
)
"""A study that was made twice is an error that our caller answers by opening it; attributes are replaced."""

for _name in _REPEATABLE:
    setattr(LastingStorage, _name, _repeated(_name))
