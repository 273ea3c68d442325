<!-- include start from vpp-ipsec/metrics.xml.i -->
<node name="metrics">
  <properties>
    <help>Metrics in Prometheus' format over HTTP</help>
  </properties>
  <children>
    <leafNode name="listen-address">
      <properties>
        <help>Local address on which metrics are served</help>
        <completionHelp>
          <script>${vyos_completion_dir}/list_local_ips.sh --both</script>
        </completionHelp>
        <valueHelp>
          <format>ipv4</format>
          <description>IPv4 address</description>
        </valueHelp>
        <valueHelp>
          <format>ipv6</format>
          <description>IPv6 address</description>
        </valueHelp>
        <constraint>
          <validator name="ip-address"/>
        </constraint>
        <constraintErrorMessage>The listen address must be an IPv4 or IPv6 address</constraintErrorMessage>
      </properties>
    </leafNode>
    <leafNode name="port">
      <properties>
        <help>TCP port on which metrics are served</help>
        <valueHelp>
          <format>u32:1-65535</format>
          <description>TCP port</description>
        </valueHelp>
        <constraint>
          <validator name="numeric" argument="--range 1-65535"/>
        </constraint>
        <constraintErrorMessage>The port must be from 1 to 65535</constraintErrorMessage>
      </properties>
      <defaultValue>9477</defaultValue>
    </leafNode>
  </children>
</node>
<!-- include end -->
