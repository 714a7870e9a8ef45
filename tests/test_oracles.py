"""Every case in oracle_data/ agrees with the original code, and the runner notices when one does not."""
import json
import shutil
from pathlib import Path

import oracles
import pytest

DATA = Path(__file__).parent / "oracle_data"
CASES = oracles.find_cases([DATA])


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_case(path):
    label, worst, status, remarks = oracles.run(path)
    assert status == "ok", f"{label}: {status}, error {worst:.1e}, {remarks}"


def test_a_case_that_compares_nothing_is_empty(tmp_path, capsys):
    path = altered(tmp_path, lambda case: [case["outputs"].pop(k) for k in list(case["outputs"])])
    assert oracles.run(path)[2] == "empty"
    assert not oracles.main([str(path)])
    assert "empty" in capsys.readouterr().out


def altered(tmp_path, change):
    """A copy of a small case under another name, its json changed."""
    source = DATA / "demo_sampler" / "ddim50.json"
    shutil.copy(source.with_suffix(".safetensors"), tmp_path / "other.safetensors")
    case = json.loads(source.read_text())
    change(case)
    (tmp_path / "other.json").write_text(json.dumps(case))
    return tmp_path / "other.json"


def test_renamed_case_runs(tmp_path, capsys):
    path = altered(tmp_path, lambda case: None)
    assert not oracles.main([str(tmp_path)])  # a folder
    assert not oracles.main([str(path)])  # the file itself
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[2]) for line in lines] == [("demo_sampler/other", "ok")] * 2


def test_wrong_number_fails(tmp_path):
    path = altered(tmp_path, lambda case: case["toy"]["single"].update(s=1.1))
    _, worst, status, remarks = oracles.run(path)
    assert status == "FAIL" and worst > 1e-3 and "x_after" in remarks
    assert oracles.main([str(path)])


def test_wrong_steps_fail(tmp_path):
    path = altered(tmp_path, lambda case: case["call"]["runs"]["main"]["timesteps"].pop())
    assert oracles.run(path)[2] == "FAIL"


def test_unknown_kind_is_unsupported(tmp_path):
    path = altered(tmp_path, lambda case: case.update(kind="teleport"))
    assert oracles.run(path)[2:] == ("unsupported", "kind teleport of demo_sampler")
    assert oracles.main([str(path)])


def test_grades(tmp_path):
    """Only required outputs decide."""
    for grade, status in (("as_published", "ok"), ("debug", "ok"), ("required", "FAIL")):
        def change(case, grade=grade):
            case["toy"]["single"]["s"] = 1.1
            for spec in case["outputs"].values():
                spec["check"] = grade
        assert oracles.run(altered(tmp_path, change))[2] == status


def test_learning_rate_equals_vgens_after_the_warm_up():
    """annealing_lr as a whole differs by the warm-up, where VGen's is one update late."""
    case = oracles.Case(DATA / "vgen_data" / "annealing_lr.json")
    ours, warmup = oracles.table(case), case.config["warmup_steps"]
    for i in (0, 2):  # cosine, none
        mine, theirs = ours[f"{i}.lr"][:case.config["total_steps"]], case.expected(f"{i}.lr")
        assert mine[warmup:] == pytest.approx(theirs[warmup:len(mine)])
        assert mine[:warmup] == pytest.approx(theirs[1:warmup + 1])


def test_missing_path():
    with pytest.raises(SystemExit, match="no case"):
        oracles.main(["nowhere"])
