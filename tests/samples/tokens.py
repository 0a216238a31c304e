# SPDX-License-Identifier: Apache-2.0
"""Tokens of every form, drawn at random; none is valid anywhere."""

import random
import string

ALNUM = string.ascii_letters + string.digits


DRAWN = random.Random(4)


def drawn(count: int, letters: str = ALNUM) -> str:
    return "".join(DRAWN.choice(letters) for _ in range(count))


TOKENS = {
    "hugging-face-token": [
        "hf_" + drawn(34),
        "hf_" + drawn(34, string.ascii_letters),
        "api_org_" + drawn(34),
    ],
    "github-token": [*(f"gh{kind}_{drawn(36)}" for kind in "pousr"), f"github_pat_{drawn(22)}_{drawn(59)}"],
    "aws-access-key": ["AKIA" + drawn(14, string.ascii_uppercase) + "37", "ASIA" + drawn(15).upper() + "7"],
    "aws-secret-key": [
        f"aws_secret_access_key = {drawn(40)}",
        f"AWS_SECRET_ACCESS_KEY={drawn(40, ALNUM + '+/')}",
        f'"SecretAccessKey": "{drawn(40)}"',
        f'\\"SecretAccessKey\\": \\"{drawn(40)}\\"',
    ],
    "google-api-key": ["AIza" + drawn(35)],
    "azure-storage-key": [f"AccountName=me;AccountKey={drawn(86)}=="],
    "azure-client-secret": ["aB3" + "8Q~" + drawn(34)],
    "api-key": [
        "sk-" + drawn(48),
        "sk-proj-" + drawn(60) + "-" + drawn(60) + "_" + drawn(20),
        "sk-ant-api03-" + drawn(40) + "_" + drawn(40),
        "sk-or-v1-" + drawn(64, "0123456789abcdef"),
        "sk-" + drawn(32, "0123456789abcdef"),
    ],
    "slack-token": [
        "xoxb-" + drawn(12, "0123456789") + "-" + drawn(24),
        "xapp-1-" + drawn(20) + "-" + drawn(64),
        "xoxd-" + drawn(80),
    ],
    "gitlab-token": ["glpat-" + drawn(20), "glrt-" + drawn(20, ALNUM + "_-") + "q7", "glptt-" + drawn(40)],
    "npm-token": ["npm_" + drawn(36)],
    "pypi-token": ["pypi-AgEIcHlwaS5vcmc" + drawn(120, ALNUM + "_-") + "z"],
    "stripe-key": ["sk_live_" + drawn(24), "rk_live_" + drawn(99), "sk_test_" + drawn(24)],
    "vault-token": ["hvs." + drawn(95), "hvb." + drawn(130)],
    "docker-token": ["dckr_pat_" + drawn(27)],
    "nvidia-api-key": ["nvapi-" + drawn(64)],
    "json-web-token": [
        f"eyJhbGciOiJIUzI1NiJ9.eyJ{drawn(40)}.{drawn(43)}",
        f"eyJhbGciOiJSUzI1NiIsImtpZCI6Ing{drawn(40)}.eyJ{drawn(1200)}.{drawn(342)}",
    ],
    "webhook-url": [
        f"https://hooks.slack.com/services/T02{drawn(8).upper()}/B02{drawn(8).upper()}/{drawn(24)}",
        f"https://hooks.slack.com/triggers/T02{drawn(8).upper()}/7012345678901/{drawn(32)}",
        f"https://discord.com/api/webhooks/112233445566778899/{drawn(68)}",
        f"https://ptb.discordapp.com/api/webhooks/112233445566778899/{drawn(68)}",
        "https://acme.webhook.office.com/webhookb2/0b7c1a52-1111-2222-3333-0123456789ab@0b7c1a52-1111-2222"
        f"-3333-0123456789ab/IncomingWebhook/{drawn(32, '0123456789abcdef')}"
        "/0b7c1a52-1111-2222-3333-0123456789ab",
        "https://prod-00.westeurope.logic.azure.com:443/workflows/0b7c1a521111/triggers/manual/paths/invoke"
        f"?api-version=2016-06-01&sp=%2Ftriggers%2Fmanual%2Frun&sv=1.0&sig={drawn(43)}",
    ],
    "private-key": [
        f"-----BEGIN {kind}PRIVATE KEY-----{end}{drawn(64, ALNUM + '+/')}"
        for kind in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED SIGSTORE ")
        for end in ("\n", "\r\n", "\\n", "\\\\n", "\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES,00\n\n")
    ],
}


EVERY = [(name, token) for name, tokens in TOKENS.items() for token in tokens]
