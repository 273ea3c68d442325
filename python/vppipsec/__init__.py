"""vppipsec keeps VPP's IPsec equal to the Linux kernel's SAs and policies."""

__version__ = "0.1.0"
