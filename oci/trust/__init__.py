# SPDX-License-Identifier: Apache-2.0
"""Signatures, in the forms of cosign and Sigstore.

keys          key pairs, and cosign's encrypted key files
statement     what is signed: an in-toto statement in a DSSE envelope
bundle        Sigstore bundles v0.3, and cosign's older simple signing
attachments   where signatures are stored: referrers of an image, or cosign's tags
keyless       certificates issued by Fulcio, by way of sigstore-python
log           entries in a transparency log, of signatures by a key
certificate   certificates of an authority of one's own
policy        whom to trust
machine       the key of this machine
seen          the newest image seen of each tag
signer        sign images
verifier      verify images; the only module that makes a `Verified`
"""
