import io
import tarfile

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

from runtime.errors import InputError
from runtime.serving import batch
from runtime.serving.batch import BatchSettings, merge_parts, run_batch, write_part_file
from runtime.serving.batch_inputs import plan_parts, read_part


@pytest.fixture
def folder(tmp_path, png):
    directory = tmp_path / "images"
    (directory / "sub").mkdir(parents=True)
    for seed in range(7):
        (directory / ("sub" if seed % 2 else "") / f"{seed}.png").write_bytes(png(seed))
    (directory / "3x.jpg").write_bytes(b"broken")
    (directory / "notes.txt").write_text("no image")
    return directory


@pytest.fixture
def in_process(monkeypatch, engine):
    """Parts are done here instead of on Ray; a list of their numbers."""
    done = []

    def run(settings, directory, missing):
        from runtime.serving.batch_inputs import Part

        for number in missing:
            import json

            part = Part.from_dict(json.loads(batch._input_file(directory, number).read_text()))
            write_part_file(engine, part, batch._part_file(directory, number), settings, None)
            done.append(number)

    monkeypatch.setattr(batch, "_run", run)
    return done


def settings(bundle, source, out, **more):
    return BatchSettings(bundle=str(bundle), input=str(source), output=str(out), chunk=3, **more)


@pytest.mark.usefixtures("in_process")
def test_every_image_of_a_folder_is_one_row_and_unreadable_ones_have_their_error(
    bundle, folder, tmp_path, direct
):
    result = run_batch(settings(bundle, folder, tmp_path / "out.parquet"))
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.[pj]*g"))
    assert sorted(row["image"] for row in rows) == names
    assert (result.images, result.errors, result.parts) == (8, 1, 3)
    for row in rows:
        if row["image"] == "3x.jpg":
            assert "not an image" in row["error"]
            assert row["task"] is None
        else:
            (wanted,) = direct([(folder / row["image"]).read_bytes()])
            assert (row["error"], row["task"], row["label"]) == (None, wanted["task"], wanted["label"])
            assert row["score"] == pytest.approx(wanted["score"], abs=1e-6)
            assert row["gates"] == pytest.approx(wanted["gates"], abs=1e-6)
            assert row["unknown"] == pytest.approx(wanted["unknown"], abs=1e-6)
            assert row["is_unknown"] == wanted["is_unknown"]
            assert row["route_confidence"] == pytest.approx(wanted["route_confidence"], abs=1e-5)
    assert not (tmp_path / "out.parquet.parts").exists()


def test_an_interrupted_job_does_only_what_is_missing(bundle, folder, tmp_path, in_process, monkeypatch):
    real = batch._run

    def killed(settings, directory, missing):
        real(settings, directory, missing[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_run", killed)
        with pytest.raises(KeyboardInterrupt):
            run_batch(settings(bundle, folder, tmp_path / "out.parquet"))
    assert not (tmp_path / "out.parquet").exists()
    result = run_batch(settings(bundle, folder, tmp_path / "out.parquet"))
    assert in_process == [0, 1, 2]
    assert result.kept_parts == 2
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 8


@pytest.mark.usefixtures("in_process")
def test_parts_of_another_job_are_not_mixed_in(bundle, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_batch(settings(bundle, folder, tmp_path / "out.parquet"))
    with pytest.raises(InputError, match=r"another job .*top_k"):
        run_batch(settings(bundle, folder, tmp_path / "out.parquet", top_k=2))
    (folder / "new.png").write_bytes(b"x")
    with pytest.raises(InputError, match="inputs"):
        run_batch(settings(bundle, folder, tmp_path / "out.parquet"))


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_rows_are_read_row_group_by_row_group(tmp_path, png, as_struct):
    contents = [png(seed) for seed in range(5)] + [None]
    values = [{"bytes": content, "path": "x"} for content in contents] if as_struct else contents
    pq.write_table(pa.table({"image": values, "label": range(6)}), tmp_path / "t.parquet", row_group_size=4)
    parts = plan_parts(str(tmp_path), "image", 100)
    assert [part.rows for part in parts] == [4, 2]
    read = [pair for part in parts for pair in read_part(part)]
    assert [name for name, _ in read] == [f"t.parquet:{row}" for row in range(6)]
    assert [content for _, content in read[:5]] == contents[:5]
    assert isinstance(read[5][1], InputError)
    with pytest.raises(InputError, match=r"no column 'picture'.*image, label"):
        plan_parts(str(tmp_path), "picture", 100)


def test_shards_are_streamed_and_a_damaged_one_says_so(tmp_path, png):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
            for name, content in ((f"{number}.png", png(number)), (f"{number}.cls", b"3")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:700])
    first, second = plan_parts(str(tmp_path), "image", 100)
    assert list(read_part(first)) == [("0.tar:0.png", png(0))]
    ((name, fault),) = list(read_part(second))[-1:]
    assert name == "1.tar"
    assert "damaged" in str(fault)


def test_a_missing_or_empty_input_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such"):
        plan_parts(str(tmp_path / "nope"), "image", 10)
    with pytest.raises(InputError, match="no images"):
        plan_parts(str(tmp_path), "image", 10)


def test_a_merge_that_lacks_rows_writes_nothing(bundle, engine, folder, tmp_path):
    (part, *_) = plan_parts(str(folder), "image", 3)
    out = batch._part_file(tmp_path, 0)
    write_part_file(engine, part, out, settings(bundle, folder, tmp_path / "o"), None)
    with pytest.raises(InputError, match="3 rows, the input has 8"):
        merge_parts(tmp_path, 1, tmp_path / "out.parquet", 8)
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []
    assert np.isfinite(pq.read_table(out).column("score").to_numpy()).any()
