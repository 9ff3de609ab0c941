"""What the tests of the page share: a browser, a server of files, the runtime, pages of a small model and of ours."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from playwright.sync_api import Browser, sync_playwright
from tests.conftest import fill_

from gobelin.cache_folder import cache_folder
from gobelin.checkpoint import Model, open_model
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.head_weights import PATCH_FEATURES, WORD_FEATURES, HeadWeights
from gobelin.pipeline import shipped_model
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.settings import Settings
from gobelin.static_page import runtime_files, write_page
from gobelin.static_page.runtime_files import RuntimeFiles, find_runtime
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCRIPTS = Path(runtime_files.__file__).parent

HAS_RUNTIME = (cache_folder("onnxruntime-web") / runtime_files.VERSION).is_dir()
"""Whether ONNX Runtime Web was got before: tests use no network."""
NO_RUNTIME = RuntimeFiles(script=b"export {};", program=b"\0asm")

RunScript = Callable[..., Any]


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as ``python -m http.server`` does; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser, closed with each file of tests: Playwright runs once at a time in a process."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def script(browser: Browser) -> Iterator[RunScript]:
    """Runs JavaScript beside the page's modules: ``script("(await module('noise')).…", argument)``."""
    with served(SCRIPTS) as address:
        tab = browser.new_page()
        tab.goto(f"{address}/licences.txt")

        def run(body: str, argument: object = None) -> Any:
            load = f"const module = (name) => import(`{address}/${{name}}.js`);"
            return tab.evaluate(f"async (given) => {{ {load} {body} }}", argument)

        yield run
        tab.close()


def make_small_model(**changes: Any) -> Model:
    """A model with random weights, which half precision holds, that is exported and paints in a moment."""
    tokenizer = Tokenizer.train(["a red ring and a blue star"] * 3, vocab_size=540, max_length=12)
    unet = UNetConfig.of(
        *(8, 16),
        attention=(True, False),
        sample_size=8,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = VAEConfig(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False, sample_size=16
    )
    text = TextEncoderConfig.of(16, layers=2, heads=2, vocab_size=len(tokenizer.vocab), max_position_embeddings=12)
    with torch.device("meta"):
        networks = UNet(unet), VAE(vae), TextEncoder(text)
    networks = tuple(fill_(network, number).half().float() for number, network in enumerate(networks))
    parts: dict[str, Any] = {
        "unet": networks[0],
        "vae": networks[1],
        "text_encoder": networks[2],
        "tokenizer": tokenizer,
        "schedule": NoiseSchedule(ScheduleConfig.zero_terminal_snr()),
        "recommended": Settings(sampler="ddpm", steps=4, guidance=2.0, guidance_rescale=0.0),
        "name": "small",
    }
    return Model(**{**parts, **changes})


@pytest.fixture(scope="session")
def small_model() -> Model:
    return make_small_model()


@pytest.fixture(scope="session")
def weighted_model() -> Model:
    """The small model, with head weights of its finest level."""
    sites = [site for site in make_small_model().unet.attention_sites if site.grid(8, 8) == (8, 8)]
    heads = {kind: {site.name: site.heads for site in sites if site.kind == kind} for kind in ("cross", "self")}
    features = len(WORD_FEATURES) * sum(heads["cross"].values()) + len(PATCH_FEATURES) * sum(heads["self"].values())
    weights = torch.randn(features, generator=torch.Generator().manual_seed(0))
    chosen = HeadWeights(cross=heads["cross"], own=heads["self"], weights=weights / 4, bias=-0.5)
    pointing = {"noun": {"iou": 0.5, "perfect": 0.9, "everywhere": 0.1}, "place": {"iou": 0.2}}
    return make_small_model(head_weights=chosen, pointing=pointing, name="weighted")


@pytest.fixture(scope="session")
def weighted_page(weighted_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(weighted_model, tmp_path_factory.mktemp("weighted") / "page")


@pytest.fixture(scope="session")
def shipped() -> Model:
    return open_model(shipped_model(), torch.device("cpu"), torch.float32)


def written(model: Model, folder: Path) -> Path:
    """Write the page of a model; where there is no runtime, with files that stand for it."""
    jaxtyping.config.update("jaxtyping_disable", True)  # what is exported has shapes that it cannot check
    size = write_page(model, folder, find_runtime() if HAS_RUNTIME else NO_RUNTIME)
    assert size == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return folder


@pytest.fixture(scope="session")
def small_page(small_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the small model, of which each test takes a copy to change it."""
    return written(small_model, tmp_path_factory.mktemp("small") / "page")


@pytest.fixture(scope="session")
def shipped_page(shipped: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(shipped, tmp_path_factory.mktemp("shipped") / "page")
