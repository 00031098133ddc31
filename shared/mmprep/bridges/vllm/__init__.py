"""Bridge to vLLM 0.33: requests for its token-in, token-out endpoint, its multimodal items, and a plug-in for it.

- :func:`to_generate_request` makes the body for ``/inference/v1/generate``; it needs no vLLM.
- :func:`to_mm_kwargs_item` and :func:`inject_into_mm_cache` are for programs that hold vLLM's own objects.
- :mod:`mmprep.bridges.vllm.plugin` lets a vLLM server take addresses in shared memory in place of tensors.
"""

from mmprep.bridges.vllm.items import inject_into_mm_cache, to_mm_kwargs_item
from mmprep.bridges.vllm.requests import to_generate_request

__all__ = ["inject_into_mm_cache", "to_generate_request", "to_mm_kwargs_item"]
