#!/bin/sh
# Tells what the guest's kernel has, in lines "has ...", by making and removing one of each. Status 0 where it has ESP.
address="src 10.0.0.1 dst 10.0.0.2 proto esp spi 0x100"
ip xfrm state add $address reqid 1 mode tunnel aead "rfc4106(gcm(aes))" 0x000102030405060708090a0b0c0d0e0f10111213 128 2>&1 ||
    exit 1
ip xfrm state list | grep -q "spi 0x00000100" || exit 1
ip xfrm state delete $address
echo "has ESP"
ip link add probe0 type dummy 2>/dev/null
ip link add probe1 type xfrm dev probe0 if_id 1 2>/dev/null && echo "has xfrm interfaces"
ip link delete probe1 2>/dev/null
ip link delete probe0 2>/dev/null
modprobe vhost_net 2>/dev/null
[ -c /dev/vhost-net ] && { : <>/dev/vhost-net; } 2>/dev/null && echo "has vhost-net"
exit 0
