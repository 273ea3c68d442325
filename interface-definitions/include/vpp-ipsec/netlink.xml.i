<!-- include start from vpp-ipsec/netlink.xml.i -->
<node name="netlink" owner="${vyos_conf_scripts_dir}/vpp_ipsec.py">
  <properties>
    <help>Netlink sockets of the control plane and of IPsec acceleration</help>
    <priority>910</priority>
  </properties>
  <children>
    <leafNode name="batch-delay-ms">
      <properties>
        <help>How long events are gathered before they are handled</help>
        <valueHelp>
          <format>u32:0-60000</format>
          <description>Time in milliseconds</description>
        </valueHelp>
        <constraint>
          <validator name="numeric" argument="--range 0-60000"/>
        </constraint>
        <constraintErrorMessage>The batch delay must be from 0 to 60000 milliseconds</constraintErrorMessage>
      </properties>
      <defaultValue>50</defaultValue>
    </leafNode>
    <leafNode name="batch-size">
      <properties>
        <help>Most events that are handled at a time</help>
        <valueHelp>
          <format>u32:1-1000000</format>
          <description>Number of events</description>
        </valueHelp>
        <constraint>
          <validator name="numeric" argument="--range 1-1000000"/>
        </constraint>
        <constraintErrorMessage>The batch size must be from 1 to 1000000 events</constraintErrorMessage>
      </properties>
      <defaultValue>10000</defaultValue>
    </leafNode>
    <leafNode name="rx-buffer-size">
      <properties>
        <help>Receive buffer of each socket</help>
        <valueHelp>
          <format>u32:65536-1073741824</format>
          <description>Size in bytes</description>
        </valueHelp>
        <constraint>
          <validator name="numeric" argument="--range 65536-1073741824"/>
        </constraint>
        <constraintErrorMessage>The receive buffer must be from 65536 to 1073741824 bytes</constraintErrorMessage>
      </properties>
      <defaultValue>268435456</defaultValue>
    </leafNode>
  </children>
</node>
<!-- include end -->
