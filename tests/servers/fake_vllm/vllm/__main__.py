# SPDX-License-Identifier: Apache-2.0
from vllm.cli import main

main()
