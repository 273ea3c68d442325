<!-- include start from include/version/vpp-ipsec-version.xml.i -->
<syntaxVersion component="vpp-ipsec" version="1"></syntaxVersion>
<!-- include end -->
