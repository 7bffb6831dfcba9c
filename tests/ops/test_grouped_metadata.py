"""The metadata of a batch: whatever the mix, tiles cover each row that has adapters once, with its own members."""

import numpy as np
import pytest
import torch

from fused_lora.ops.grouped.metadata import GroupLayout, build_metadata
from helpers.seeds import shifted


def read_back(layout, buffer):
    """{row: list of (slot, weight)} as a kernel would find it, asserting that no row comes twice."""
    views = layout.views(torch.from_numpy(buffer))
    found = {}
    for first, rows, begin, end in views.tiles[: int(views.num_tiles)].tolist():
        assert 1 <= rows <= views.block_m and 1 <= end - begin <= views.group_size
        members = list(zip(views.member_slot[begin:end].tolist(), views.member_weight[begin:end].tolist(), strict=True))
        for row in views.order[first : first + rows].tolist():
            assert row not in found
            found[row] = members
    return found


@pytest.mark.parametrize(
    "max_rows, max_groups, group_size", [(1, 1, 1), (64, 64, 2), (300, 3, 1), (64, 5, 4), (7, 90, 3)]
)
def test_any_mix_reads_back_and_fits(max_rows, max_groups, group_size):
    layout = GroupLayout(max_rows, max_groups, group_size, slots=50)
    random = np.random.default_rng(shifted(max_rows))
    buffer = np.full(layout.size, -7, np.int32)
    for _ in range(30):
        groups = [
            [
                (int(random.integers(50)), float(np.float32(random.normal())))
                for _ in range(random.integers(group_size) + 1)
            ]
            for _ in range(random.integers(max_groups + 1))
        ]
        group_of_row = (
            random.integers(-1, len(groups), random.integers(max_rows + 1)) if groups else np.full(max_rows, -1)
        )
        assert build_metadata(layout, group_of_row, groups, buffer) is buffer
        assert read_back(layout, buffer) == {row: groups[g] for row, g in enumerate(group_of_row) if g >= 0}


@pytest.mark.parametrize("max_rows, max_groups", [(1, 1), (64, 64), (64, 2), (1000, 7), (33, 40)])
def test_the_worst_batch_has_max_tiles(max_rows, max_groups):
    """Groups of one row more than whole tiles; no capacity is left over and none is missing."""
    layout = GroupLayout(max_rows, max_groups)
    groups = [[(g, 1.0)] for g in range(min(max_groups, max_rows))]
    rest = max_rows - len(groups)
    group_of_row = [*range(len(groups)), *[0] * rest]
    assert build_metadata(layout, group_of_row, groups)[0] == layout.max_tiles == len(groups) + rest // layout.block_m


@pytest.mark.parametrize("group_of_row, groups", [([], []), ([-1, -1], []), ([-1, -1], [[(0, 1.0)]])])
def test_base_rows_are_in_no_tile(group_of_row, groups):
    assert build_metadata(GroupLayout(4, 2), group_of_row, groups)[0] == 0


def test_rows_of_a_group_keep_their_order():
    layout = GroupLayout(8, 2)
    buffer = build_metadata(layout, [1, 0, 1, -1, 0, 1], [[(4, 1.0)], [(2, 1.0)]])
    assert layout.views(torch.from_numpy(buffer)).order[:5].tolist() == [1, 4, 0, 2, 5]


def test_views_share_the_buffer_and_start_at_16_bytes():
    layout = GroupLayout(5, 3, 2)
    buffer = torch.zeros(layout.size, dtype=torch.int32)
    views = layout.views(buffer)
    for tensor in (views.num_tiles, views.tiles, views.order, views.member_slot, views.member_weight):
        assert (tensor.data_ptr() - buffer.data_ptr()) % 16 == 0
    buffer[layout.sections["member_weight"]] = torch.tensor([0.5] * 6).view(torch.int32)
    assert views.member_weight.tolist() == [0.5] * 6
    assert views.grid_tiles == layout.max_tiles and layout.views(buffer, tiles=2).grid_tiles == 2


@pytest.mark.parametrize(
    "group_of_row, groups, message",
    [
        ([0] * 9, [[(0, 1.0)]], "group_of_row: 9 rows, the layout holds 8"),
        ([0], [[(0, 1.0)]] * 4, "groups: 4, the layout holds 3"),
        ([1], [[(0, 1.0)]], "group_of_row: expected -1 to 0, got 1 to 1"),
        ([-2], [[(0, 1.0)]], "group_of_row: expected -1 to 0, got -2 to -2"),
        ([0], [[]], r"groups\[0\]: expected 1 to 2 members, got 0"),
        ([0], [[(0, 1.0)] * 3], r"groups\[0\]: expected 1 to 2 members, got 3"),
        ([0], [[(0, 1.0)], [(10, 1.0)]], r"groups\[1\]: expected slots of 0 to 9"),
        ([0], [[(-1, 1.0)]], r"groups\[0\]: expected slots of 0 to 9"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(group_of_row, groups, message):
    layout = GroupLayout(8, 3, 2, slots=10)
    out = np.full(layout.size, 3, np.int32)
    with pytest.raises(ValueError, match=message):
        build_metadata(layout, group_of_row, groups, out)
    assert (out == 3).all()


def test_wrong_buffers_are_refused():
    layout = GroupLayout(8, 3)
    with pytest.raises(ValueError, match="out: expected int32"):
        build_metadata(layout, [-1], [], np.zeros(layout.size + 1, np.int32))
    with pytest.raises(ValueError, match="buffer: expected int32"):
        layout.views(torch.zeros(layout.size))
    with pytest.raises(ValueError, match="max_groups: expected at least 1, got 0"):
        GroupLayout(8, 0)
