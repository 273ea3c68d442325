"""A VPP stand-in that speaks VPP's real socket API, for machines without VPP.

It keeps SAs, interfaces, protections, tables of routes, access lists, ABF policies and reference counts, refuses what VPP
refuses with VPP's numbers, leaks what VPP leaks and dies where VPP dies. It forwards no packets. A conformance test holds it
against a real VPP, answer by answer.
"""
