"""A VPP stand-in that speaks VPP's real socket API, for machines without VPP.

It keeps SAs, interfaces, protections, FIB tables, ACLs, ABF policies and reference counts. It refuses with VPP's error numbers,
leaks where VPP leaks, and dies where VPP crashes. It forwards no packets. A conformance test compares its answers with those of
a real VPP, one by one.
"""
