"""The COCO file, read by pycocotools."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from pipeline.explore.export import coco as export_coco
from pipeline.explore.export import common_layout
from pipeline.runtime.errors import UserError
from tests import fake_run, labelled_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    paths = labelled_run.build(root)
    export_coco.run(paths, str(root / "out.json"))
    return paths, root / "out.json"


def test_pycocotools_finds_every_sample_in_its_cluster(made):
    paths, file = made
    coco, rows = COCO(str(file)), labelled_run.rows(paths)
    assert len(coco.getImgIds()) == len(coco.getAnnIds()) == len(rows)
    for row in rows:
        (image,) = [i for i in coco.imgs.values() if i["sample_id"] == row["sample_id"]]
        assert (image["width"], image["height"]) == (row["image_width"], row["image_height"])
        assert image["caption"] == row["caption"]
        assert image["coco_url"] == row["url"]
        (annotation,) = coco.imgToAnns[image["id"]]
        assert coco.cats[annotation["category_id"]]["cluster_id"] == row["cluster_id"]
        assert annotation["score"] == pytest.approx(row["confidence"], abs=1e-6)


def test_pycocotools_finds_clusters_by_name(made):
    paths, file = made
    coco = COCO(str(file))
    names = [category["name"] for category in coco.loadCats(coco.getCatIds())]
    assert names == [f"{fake_run.SCRIPT} (0)", "green & <b>leafy</b>", f"{fake_run.SCRIPT} (2)"]
    ids = coco.getImgIds(catIds=coco.getCatIds(catNms=[names[2]]))
    found = {coco.imgs[i]["sample_id"] for i in ids}
    assert found == {r["sample_id"] for r in labelled_run.rows(paths) if r["cluster_id"] == 2}


def test_the_annotation_is_the_whole_image(made):
    coco = COCO(str(made[1]))
    annotation = coco.anns[1]
    assert annotation["bbox"] == [0, 0, 120, 80]
    assert np.asarray(coco.annToMask(annotation)).sum() == annotation["area"] == 120 * 80


def test_pycocotools_takes_the_annotations_as_results(made, tmp_path):
    """As a detector's output, beside which another's can be scored."""
    coco = COCO(str(made[1]))
    kept = ("image_id", "category_id", "bbox", "score")
    results = [{name: a[name] for name in kept} for a in coco.dataset["annotations"]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert len(coco.loadRes(str(tmp_path / "results.json")).anns) == len(coco.anns)


def test_without_a_column_url(made, tmp_path):
    source = common_layout.open_run(made[0])
    row = labelled_run.rows(made[0])[0]
    assert "coco_url" not in export_coco.image(1, "00000", {**row, "url": None})
    assert "coco_url" not in export_coco.image(1, "00000", {**row, "url": 5})
    assert export_coco.categories(source)[0]["id"] == 1


def test_a_folder_is_no_file(made, tmp_path):
    with pytest.raises(UserError, match=r"such as .*/coco\.json"):
        export_coco.run(made[0], str(tmp_path))
