# SPDX-License-Identifier: Apache-2.0
"""Registries, by the OCI distribution specification 1.1.

From the bottom up:

    url           URLs, and which hosts are this machine
    proxy         which proxy the environment names for a URL
    certificates  the authorities that are trusted, and the client certificate
    sockets       sockets with a deadline for all that comes over them
    connection    one connection, made by urllib3 over these sockets
    transport     a pool of connections; one request, one answer
    retry         what is attempted again, and after how long
    credentials   names and passwords, from where docker, podman and Kubernetes keep them
    tokens        challenges, and a token for each scope
    host          one host: retries, renewed tokens, redirects
    registries_conf   mirrors and insecure registries, from where podman keeps them
    access        how one command reaches registries
    hosts         a registry with its mirrors
    blobs         parts of blobs, and blobs that are sent
    download      blobs over many connections, given out in order
    referrers     lists of what refers to a manifest
    repository    one repository: manifests, blobs, uploads, mounts
    login         credentials that a user gives
"""
