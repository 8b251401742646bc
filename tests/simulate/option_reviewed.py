"""Survivors of the study of kernels with options, each with the reason why it is no defect."""

REVIEWED: dict[str, dict[str, str]] = {"gluon_fwd_sm90": {}, "gluon_bwd_sm90": {}, "triton_fwd": {}, "triton_bwd": {}}
