"""The cache of what was learnt: what is written comes back, and what is damaged is learnt anew."""

import numpy as np
import torch

from autoprune.network.criteria.knowledge import SCHEMA, Knowledge, read_knowledge, write_knowledge
from autoprune.network.models.checkpoints import read_metadata, read_state, save_state


def test_knowledge_comes_back_as_it_was(bench, tmp_path):
    path, knowledge = tmp_path / "deep" / "knowledge.safetensors", bench.knowledge
    write_knowledge(path, knowledge)
    again = read_knowledge(path, device="cpu")
    assert again is not None
    assert again.tables == knowledge.tables
    assert set(again.statistics) == set(knowledge.statistics)
    for name, moments in knowledge.statistics.items():
        other = again.statistics[name]
        assert torch.equal(other.gram, moments.gram)
        assert torch.equal(other.mean, moments.mean)
        assert (other.rows, other.kernel) == (moments.rows, moments.kernel)
    for criterion, by_group in knowledge.scores.items():
        for group, scores in by_group.items():
            np.testing.assert_array_equal(again.scores[criterion][group], scores)
    assert again.targets is not None
    assert again.targets.rows == knowledge.targets.rows
    assert torch.equal(again.targets.images, knowledge.targets.images)
    assert all(torch.equal(again.targets.outputs[n], t) for n, t in knowledge.targets.outputs.items())
    assert [p.name for p in path.parent.iterdir()] == ["knowledge.safetensors"]


def test_knowledge_without_targets_comes_back_without(bench, tmp_path):
    path = tmp_path / "k.safetensors"
    write_knowledge(path, Knowledge(bench.knowledge.statistics, None, bench.knowledge.scores, bench.knowledge.tables))
    assert read_knowledge(path, device="cpu").targets is None


def test_no_file_is_no_knowledge(tmp_path):
    assert read_knowledge(tmp_path / "none.safetensors", device="cpu") is None


def test_a_damaged_file_is_no_knowledge(bench, tmp_path):
    path = tmp_path / "k.safetensors"
    write_knowledge(path, bench.knowledge)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 200):
        path.write_bytes(part)
        assert read_knowledge(path, device="cpu") is None


def test_a_file_of_another_version_is_no_knowledge(bench, tmp_path):
    path = tmp_path / "k.safetensors"
    write_knowledge(path, bench.knowledge)
    save_state(read_state(path), path, {**read_metadata(path), "schema": str(SCHEMA + 1)})
    assert read_knowledge(path, device="cpu") is None
