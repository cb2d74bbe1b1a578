# SPDX-License-Identifier: Apache-2.0
"""Who multiplies what in many_columns_wgmma: the host's part of it, which needs neither a GPU nor nvcc."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ROOM = 9 << 20  # elements of the workspace, for two tiles of each of 132 workers

PROBLEMS = [
    # An H100 runs 132 blocks at a time, 66 clusters of two and 43 of three.
    *itertools.product(
        (64, 3000, 4096, 17920, 28672, 57344),
        (65, 128, 256, 600),
        (1, 5, 32, 40, 64, 112),
        (ROOM,),
        ((132, 66, 43),),
    ),
    (57344, 256, 64, 1 << 20, (132, 66, 43)),
    (128256, 256, 64, ROOM, (132, 66, 43)),
    *itertools.product(
        (4500, 16000), (100, 256), (37, 500), (ROOM,), ((78, 39, 26), (114, 57, 0), (7, 3, 1))
    ),
]


@pytest.fixture(scope="module")
def schedules(tmp_path_factory):
    """What print_pieces.cpp prints for each of PROBLEMS: the numbers of its first line, and its pieces."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = tmp_path_factory.mktemp("schedule") / "pieces"
    sources = [Path(__file__).with_name("print_pieces.cpp"), ROOT / "csrc/cuda/wgmma_schedule.cpp"]
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", f"-I{ROOT / 'csrc/cuda'}", *sources, "-o", program], check=True
    )
    lines = "".join(
        f"{rows} {columns} {chunks} {room} {' '.join(map(str, resident))}\n"
        for rows, columns, chunks, room, resident in PROBLEMS
    )
    printed = subprocess.run([program], input=lines, check=True, stdout=subprocess.PIPE, text=True).stdout
    blocks = [
        [tuple(map(int, line.split())) for line in block.splitlines()]
        for block in printed.strip().split("\n\n")
    ]
    assert len(blocks) == len(PROBLEMS)
    return [(block[0], block[1:]) for block in blocks]


def test_every_chunk_of_every_tile_is_taken_once(schedules):
    for problem, ((_, splits, tiles, workers, _), pieces) in zip(PROBLEMS, schedules, strict=True):
        chunks = problem[2]
        assert workers <= problem[4][splits - 1] or splits > 1, problem
        taken = sorted((tile, begin, end) for _, tile, begin, end in pieces)
        expected = 0
        for tile, begin, end in taken:
            assert tile * chunks + begin == expected and begin < end <= chunks, problem
            expected = tile * chunks + end
        assert expected == tiles * chunks, problem


def test_a_tile_is_shared_by_neighbours_only(schedules):
    """WgmmaJoin counts on it: a piece that does not begin a tile meets the worker before, one that does not end it the next."""
    shared = 0
    for problem, ((_, splits, _, workers, whole_tiles), pieces) in zip(PROBLEMS, schedules, strict=True):
        chunks = problem[2]
        owners: dict[int, list] = {}
        for worker, tile, begin, end in pieces:
            owners.setdefault(tile, []).append((begin, end, worker))
        for tile, parts in owners.items():
            assert len(parts) <= 2, problem
            if len(parts) == 2:
                (_, _, first), (_, _, second) = sorted(parts)
                assert second == first + 1 and tile >= whole_tiles and splits == 1, problem
                shared += 1
        room = 2 * workers * 128 * schedules[PROBLEMS.index(problem)][0][0]
        assert room <= problem[3] or all(len(parts) == 1 for parts in owners.values()), problem
        assert all(begin == 0 or end == chunks for _, _, begin, end in pieces), problem
    assert shared > 1000


def test_sharing_evens_out_the_work(schedules):
    """57344 x 8192 with 256 columns on 132 multiprocessors: whole tiles would be 4 x 64 chunks for some and 3 x 64 for others."""
    index = PROBLEMS.index((57344, 256, 64, ROOM, (132, 66, 43)))
    (columns, splits, tiles, workers, _), pieces = schedules[index]
    assert (columns, splits, tiles, workers) == (256, 1, 448, 132)
    taken = [0] * workers
    for worker, _, begin, end in pieces:
        taken[worker] += end - begin
    assert max(taken) <= tiles * 64 / workers + 2 and min(taken) >= tiles * 64 / workers - 3
