"""llama.cpp through llama-cpp-python: all weights in memory, or with --mmap mapped, so that the system can drop them.

A mapped model is computed as it is in the file: llama.cpp else keeps a second, rearranged copy, which cannot be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import timed
from llama_cpp import llama_cpp as library


def main() -> None:
    parser = timed.parser(__doc__)
    parser.add_argument("--mmap", action="store_true")
    options = parser.parse_args()
    if options.mmap:
        defaults = library.llama_model_default_params

        def without_copies() -> Any:
            params = defaults()
            params.use_extra_bufts = False
            return params

        library.llama_model_default_params = without_copies  # Llama() has no argument for it

    def load() -> timed.Generate:
        model = llama_cpp.Llama(
            str(options.model),
            n_ctx=options.context,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            use_mmap=options.mmap,
            verbose=False,
        )

        def generate(prompt: Sequence[int], tokens: int, on_token: Callable[[int], None]) -> None:
            model.reset()  # else what two prompts begin with is taken from the cache
            steps = model.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
            for _ in range(tokens):
                on_token(next(steps))

        return generate

    timed.report(load, options, ("llama-cpp-python",), extra_buffers=not options.mmap)


if __name__ == "__main__":
    main()
