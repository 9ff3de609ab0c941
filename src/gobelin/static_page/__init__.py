"""A page that paints in the browser, without a server: a folder of files that any host can serve.

The networks are graphs that ONNX Runtime Web runs (:mod:`gobelin.static_page.browser_graphs`), with attention maps as
further outputs. Tokenizer, noise, sampler and maps are written again in JavaScript beside this file, and tested against
ours.
"""

from gobelin.static_page.runtime_files import RuntimeFiles, find_runtime
from gobelin.static_page.writer import write_page

__all__ = ["RuntimeFiles", "find_runtime", "write_page"]
