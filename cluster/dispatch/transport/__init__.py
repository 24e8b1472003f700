"""What carries rows between the ranks of an epoch: process groups over gloo or NCCL, or memory of one host."""
