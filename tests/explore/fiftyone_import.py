"""Run by a Python with FiftyOne: import an export, print its samples, a line of JSON each.

python fiftyone_import.py EXPORT. Without a mongod, FiftyOne's importer alone reads the folder.
"""

import json
import os
import sys

os.environ.setdefault("FIFTYONE_DO_NOT_TRACK", "true")
try:
    import fiftyone as fo

    samples = fo.Dataset.from_dir(dataset_dir=sys.argv[1], dataset_type=fo.types.FiftyOneDataset)
except Exception as error:
    if type(error).__name__ not in ("FiftyOneConfigError", "ServiceExecutableNotFound"):
        raise
    os.environ["FIFTYONE_DISABLE_SERVICES"] = "1"
    import fiftyone as fo
    from fiftyone.utils.data import importers

    samples = importers.build_dataset_importer(fo.types.FiftyOneDataset, dataset_dir=sys.argv[1])[0]
    samples = importers._handle_legacy_formats(samples)
    samples.setup()

for sample in samples:
    truth = sample["ground_truth"] if sample.has_field("ground_truth") else None
    line = {
        "filepath": sample.filepath,
        "sample_id": sample["sample_id"],
        "cluster": sample["cluster"].label,
        "confidence": sample["cluster"].confidence,
        "truth": truth and truth.label,
        "size": [sample.metadata.width, sample.metadata.height],
        "url": sample["original"]["url"],
    }
    print(json.dumps(line))
