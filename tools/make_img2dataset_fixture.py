"""Make tests/img2dataset: a small collection as img2dataset writes it, of bundled emoji.

    python tools/make_img2dataset_fixture.py

Needs a Python with img2dataset (1.47.0 when the folder was made) and nothing of ours. A server on
this machine hands out the pictures; one address leads nowhere, one to a text.
"""

import shutil
import tarfile
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from img2dataset import download

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "examples" / "noto-emoji" / "00000.tar"
OUT = ROOT / "tests" / "img2dataset"
PICTURES = 8
CAPTIONS = ["grinning face", 'quoted, "with" commas', "línea única", None]


def unpack(folder: Path) -> list[str]:
    """The first pictures, under names of ours."""
    names = []
    with tarfile.open(EMOJI) as tar:
        for member in tar:
            if member.name.endswith(".jpg") and len(names) < PICTURES:
                names.append(f"{len(names)}.jpg")
                source = tar.extractfile(member)
                assert source is not None
                (folder / names[-1]).write_bytes(source.read())
    (folder / "text.jpg").write_text("no picture")
    return [*names[:3], "nowhere.jpg", "text.jpg", *names[3:]]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = unpack(folder)
        handler = partial(SimpleHTTPRequestHandler, directory=temporary)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        urls = [f"{address}/{name}" for name in names]
        captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(len(urls))]
        columns = {"URL": urls, "TEXT": captions}
        columns |= {"NSFW": ["UNLIKELY"] * len(urls), "similarity": [0.3] * len(urls)}
        pq.write_table(pa.table(columns), folder / "urls.parquet")
        shutil.rmtree(OUT, ignore_errors=True)
        download(
            url_list=str(folder / "urls.parquet"),
            input_format="parquet",
            url_col="URL",
            caption_col="TEXT",
            save_additional_columns=["NSFW", "similarity"],
            output_format="webdataset",
            output_folder=str(OUT),
            number_sample_per_shard=6,
            image_size=48,
            processes_count=1,
            thread_count=2,
            enable_wandb=False,
            compute_hash="sha256",
        )
        server.shutdown()


if __name__ == "__main__":
    main()
