# SPDX-License-Identifier: Apache-2.0
"""Signatures, in the forms of cosign and Sigstore.

keys          P-256 key pairs, and cosign's encrypted key files
statement     what is signed: an in-toto statement within a DSSE envelope
bundle        Sigstore bundles v0.3, and cosign's older simple signing
attachments   where signatures lie: referrers of an image, or cosign's tags
keyless       certificates of Fulcio's, by way of sigstore-python
policy        whom we trust
signer        makes signatures
verifier      the one place where an image becomes a verified one
"""
