"""Checkpoints: all of orbax behind one module.

`workdir/checkpoints/<step>/` holds `state` (the training state's arrays), `data` (the position of
the grain iterator, the same in the file of every process) and `meta` (JSON: config, data facts,
clock, versions). A save is asynchronous and appears under its step's name only when it is complete:
a process killed in the middle leaves the step before, and nothing has to be cleaned by hand. An
older step is deleted only after a newer one is complete.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from memjax import hosts
from memjax.config_text import difference, other_config, plain
from memjax.errors import UserError

_LISTED = 12  # lines of each kind that a message about different trees shows


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's folder (a path, or a URL such as gs://...).
      every: save at the steps that this divides (at least 1).
      keep: how many of the newest steps to keep (at least 1).

    A context manager: leaving it waits for the save in progress.

    Raises:
      UserError: `every` or `keep` below 1.
    """

    def __init__(self, workdir: str, every: int = 1000, keep: int = 2):
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise UserError(f"config.checkpoint.{name}={value}: must be at least 1.")
        self.root, self.every = _root(workdir), every
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_interval_steps=every)
        self._manager = ocp.CheckpointManager(self.root, options=options)

    def due(self, step: int) -> bool:
        """Whether `save` without `force` would save this step."""
        return step % self.every == 0

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any = None,
        meta: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Saves when the step is due or `force` is set, unless this step is already there.

        The arrays and the iterator's position are taken before this returns: the caller may donate
        the state and read on. Waits for the save before it, if that is still being written.

        Args:
          state: pytree of arrays.
          data_iterator: a grain `DatasetIterator`, or None.
          meta: what JSON can hold, and ConfigDicts; `config` and `data` are compared on restoring.

        Returns:
          Whether it saved.
        """
        if not (force or self.due(step)):
            return False
        self.wait()
        if step in self._manager.all_steps():
            return False
        items = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave(plain(meta or {})),
        }
        if data_iterator is not None:
            items["data"] = grain.checkpoint.CheckpointSave(data_iterator)
        with hosts.agreement(), self._writing():
            self._check_space(state)
        with self._writing():
            return self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self,
        abstract_state: Any,
        data_iterator: Any = None,
        *,
        expect: Mapping[str, Any] | None = None,
        ignore: Sequence[str] = (),
        step: int | None = None,
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores a step; `data_iterator` is moved in place.

        Args:
          abstract_state: the state's tree with `jax.ShapeDtypeStruct` leaves that carry a sharding
            (or a state whose arrays show shapes, dtypes and shardings).
          data_iterator: the grain iterator to move, or None.
          expect: this run's meta. Its `config` and `data` must equal the checkpoint's.
          ignore: config fields that may differ (see `config.difference`).
          step: which step; None is the latest.

        Returns:
          (step, state, meta), or None when there is no checkpoint.

        Raises:
          UserError: another config, other data, or a state with another tree, shape or dtype.
        """
        step = self.latest() if step is None else step
        if step is None:
            return None
        meta = self.meta(step)
        check_meta(meta, expect or {}, f"{self.root}/{step}", ignore)
        _check_tree(self.root, step, abstract_state)
        # That of process 0, of however many: grain's own handler wants as many as there were.
        places = [*(epath.Path(self.root) / str(step) / "data").glob("process_0-of-*.json")]
        if data_iterator is not None and not places:
            raise UserError(
                f"{self.root}/{step} holds no data position, so this run cannot "
                "continue its data; use another --workdir."
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        state = self._manager.restore(step, args=args)["state"]
        if data_iterator is not None:
            data_iterator.set_state(json.loads(places[0].read_text()))
        return step, state, meta

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta of a step (None: the latest) without its arrays; {} without a checkpoint."""
        step = self.latest() if step is None else step
        return {} if step is None else _read_meta(self._manager, step)

    def wait(self) -> None:
        """Returns when the save in progress is complete; UserError when it failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    def _check_space(self, state: Any) -> None:
        """Refuses a save that the disk has no room for, before anything is written."""
        needed = 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if os.path.isdir(self.root) and shutil.disk_usage(self.root).free < needed:
            reason = f"{os.strerror(errno.ENOSPC)}; {needed / 2**20:.1f} MiB are needed"
            raise OSError(errno.ENOSPC, reason)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what goes wrong while a checkpoint is written into one message."""
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError) as err:  # tensorstore's errors are ValueErrors
            complete = [int(p.name) for p in epath.Path(self.root).iterdir() if p.name.isdigit()]
            kept = f"the last complete one is of step {max(complete)}" if complete else "none yet"
            reason = " ".join(str(err).split())[:300]
            raise UserError(
                f"{self.root}: the checkpoint cannot be written ({reason}); {kept}. Make room, "
                "then give the same command again."
            ) from err

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:  # what ended the block is the message; a failing save must not hide it
            with suppress(Exception):
                self.close()


# ---------------------------------------------------------------- reading without a run


def exists(workdir: str) -> bool:
    """Whether a run has a checkpoint."""
    root = epath.Path(_root(workdir))
    return root.is_dir() and any(child.name.isdigit() for child in root.iterdir())


def read_meta(workdir: str, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """(step, meta) of a run's checkpoint, by default the latest; no array is read.

    Raises:
      UserError: the folder holds no checkpoint, or not this step.
    """
    with _reader(workdir, step) as (manager, step):
        return step, _read_meta(manager, step)


def restore_params(
    workdir: str, abstract_params: Any = None, *, step: int | None = None, key: str = "params"
) -> tuple[int, Any, dict[str, Any]]:
    """Restores only the parameters of a run, without the optimiser's state.

    Args:
      workdir: the run's folder.
      abstract_params: tree of `jax.ShapeDtypeStruct`; leaves without a sharding go to the first
        device. None: nested dicts as the checkpoint has them, on the first device.
      step: which step; None is the latest.
      key: where the state has its parameters.

    Returns:
      (step, params, meta)

    Raises:
      UserError: no such checkpoint, or parameters with another tree, shape or dtype.
    """
    with _reader(workdir, step) as (manager, step):
        root = _root(workdir)
        stored = _stored_tree(root, step)
        if key not in stored:
            raise UserError(f"{root}/{step} has no {key!r}; it has {', '.join(sorted(stored))}.")
        if abstract_params is None:
            abstract_params = stored[key]
        else:
            _check_tree(root, step, {key: abstract_params}, inside=key)
        wanted = {key: jax.tree.map(_on_first_device, abstract_params)}
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                )
            ),
        )
        return step, restored["state"][key], _read_meta(manager, step)


def _on_first_device(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.Sharding):
        sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@contextmanager
def _reader(workdir: str, step: int | None) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    root = _root(workdir)
    if not epath.Path(root).is_dir():
        raise UserError(
            f"{workdir} holds no checkpoint (no folder {root}); give the --workdir of "
            "a run that python -m memjax.train has saved."
        )
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(root, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise UserError(f"{root} holds {what}; it has {', '.join(map(str, steps)) or 'none'}.")
        yield manager, steps[-1] if step is None else step


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return manager.restore(step, args=args)["meta"]


def _root(workdir: str) -> str:
    folder = workdir if "://" in workdir else os.path.abspath(workdir)
    return f"{folder}/checkpoints"


# ---------------------------------------------------------------- comparing


def check_meta(
    stored: Mapping[str, Any], expect: Mapping[str, Any], where: str, ignore: Sequence[str] = ()
) -> None:
    """Compares `config` and `data` (facts of the data, with their `hash`) of two metas.

    What either side lacks is not compared.

    Raises:
      UserError: they differ; the message has every field that does.
    """
    if "config" in stored and "config" in expect:
        lines = difference(stored["config"], expect["config"], ignore)
        if lines:
            raise UserError(other_config(f"{where} is of a run", lines))
    if "data" in stored and "data" in expect:
        # Earlier runs also say how many shards documents were dealt to, which was always one.
        lines = difference(stored["data"], expect["data"], ("hash", "shards"))
        if lines:
            there, here = (
                facts.get("hash", "without a hash") for facts in (stored["data"], expect["data"])
            )
            head = (
                f"{where} was trained on other data: fingerprint {there} there, {here} now. "
                "Facts that differ, there -> now:"
            )
            raise UserError(
                "\n  ".join([head, *lines])
                + "\nA run can only continue with the same data in the same order. Use "
                "another --workdir, or the data and settings it had."
            )


def _check_tree(root: str, step: int, abstract: Any, inside: str = "") -> None:
    """Raises a UserError that lists how `abstract` differs from what the checkpoint holds."""
    stored = _leaves(_stored_tree(root, step))
    stored = {k: v for k, v in stored.items() if not inside or k.startswith(f"{inside}.")}
    wanted = _leaves(abstract)
    missing = sorted(wanted.keys() - stored.keys())
    surplus = sorted(stored.keys() - wanted.keys())
    shapes = [
        f"{k}: {_shown(stored[k])} in the checkpoint, {_shown(wanted[k])} in the model"
        for k in sorted(wanted.keys() & stored.keys())
        if stored[k] != wanted[k]
    ]
    parts = [
        ("missing in the checkpoint", missing),
        ("missing in the model", surplus),
        ("different shapes or dtypes", shapes),
    ]
    if missing or surplus or shapes:
        lines = [f"{root}/{step} does not fit the model."]
        for title, found in parts:
            if found:
                more = [f"... and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
                lines += [f"  {title}:", *(f"    {x}" for x in [*found[:_LISTED], *more])]
        lines.append("Use another --workdir, or the config and the version of memjax that made it.")
        raise UserError("\n".join(lines))


def _stored_tree(root: str, step: int) -> Any:
    """The tree of a saved state as nested dicts and lists, its leaves with shape and dtype."""
    path = epath.Path(root) / str(step) / "state"
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(path)
    except (FileNotFoundError, ValueError, KeyError) as err:
        raise UserError(
            f"{path} cannot be read ({err}); delete {path.parent} to go back to the step before."
        ) from err
    return getattr(tree, "tree", tree)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Dotted path -> (shape, dtype) of every leaf; random keys as the numbers they are made of."""
    out = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
            dtype = leaf.dtype
        names = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
        out[".".join(map(str, names))] = (tuple(getattr(leaf, "shape", ())), str(dtype))
    return out


def _shown(leaf: tuple[tuple[int, ...], str]) -> str:
    return f"{leaf[1]}[{','.join(map(str, leaf[0]))}]"
