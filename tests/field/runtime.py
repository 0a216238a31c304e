# SPDX-License-Identifier: Apache-2.0
"""A runtime of MLServer that gives every inference the same answer."""

# mypy: ignore-errors
# MLServer is installed in an environment of its own.
from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Answers(MLModel):
    async def load(self) -> bool:
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        output = StringCodec.encode_output("answer", ["42"])
        return InferenceResponse(model_name=self.name, outputs=[output])
