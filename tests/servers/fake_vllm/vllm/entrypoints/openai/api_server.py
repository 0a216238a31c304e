# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm.entrypoints.openai.api_server --model MODEL [options]`."""

import asyncio
import sys

from ...cli import serve

if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
