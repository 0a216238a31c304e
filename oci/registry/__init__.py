# SPDX-License-Identifier: Apache-2.0
"""Registries, by the OCI distribution specification 1.1.

transport     connections: pooled, with deadlines; one request, one answer
tokens        who we are: challenges, tokens per scope, docker's credentials by way of oras
endpoint      one host: retries, Retry-After, renewed tokens, redirects
repository    one repository: manifests, blobs, uploads, mounts, referrers; its mirrors first
download      stretches of blobs over many connections, given out in order
"""
