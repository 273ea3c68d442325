<!-- include start from vpp-ipsec/sa.xml.i -->
<node name="sa">
  <properties>
    <help>Show the kernel's SAs and which of them VPP carries</help>
  </properties>
  <command>sudo ${vyos_op_scripts_dir}/vpp_ipsec.py show_sa</command>
  <children>
    <leafNode name="detail">
      <properties>
        <help>Show all that is known of each SA, without its keys</help>
      </properties>
      <command>sudo ${vyos_op_scripts_dir}/vpp_ipsec.py show_sa --detail</command>
    </leafNode>
    <tagNode name="peer">
      <properties>
        <help>Show the SAs with one peer</help>
        <completionHelp>
          <script>sudo ${vyos_completion_dir}/list_vpp_ipsec.py peer</script>
        </completionHelp>
      </properties>
      <command>sudo ${vyos_op_scripts_dir}/vpp_ipsec.py show_sa --peer="$6"</command>
    </tagNode>
    <tagNode name="spi">
      <properties>
        <help>Show the SAs with one SPI</help>
        <completionHelp>
          <script>sudo ${vyos_completion_dir}/list_vpp_ipsec.py spi</script>
        </completionHelp>
      </properties>
      <command>sudo ${vyos_op_scripts_dir}/vpp_ipsec.py show_sa --spi="$6" --detail</command>
    </tagNode>
  </children>
</node>
<!-- include end -->
