/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* VXLAN's outer source port, which every later 5-tuple hash sees, gets the QP's entropy; the checksum stays right. */
#ifndef QPD_ENTROPY_H
#define QPD_ENTROPY_H

#include "roce.h"

#define UDP_SOURCE 0
#define UDP_LENGTH 4
#define UDP_CHECK  6

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* Does the UDP checksum field hold the sum of the pseudo header and nothing else? So it does while the checksum is left
 * to the device (CHECKSUM_PARTIAL), and otherwise once in 65 536 packets. */
static __always_inline bool holds_pseudo_sum(struct __sk_buff *skb, __u32 ip, __u32 udp, bool v6)
{
	__be32 addresses[8] = {};
	__be16 field[2] = {}; /* length, checksum */
	__s64 sum;

	if (bpf_skb_load_bytes(skb, udp + UDP_LENGTH, field, sizeof(field)))
		return false;
	if (v6) {
		if (bpf_skb_load_bytes(skb, ip + 8, addresses, 32))
			return false;
	} else if (bpf_skb_load_bytes(skb, ip + 12, addresses, 8)) {
		return false;
	}
	sum = bpf_csum_diff(NULL, 0, addresses, sizeof(addresses), 0);
	return fold((__u32)sum + (__u64)field[0] + bpf_htons(IPPROTO_UDP)) == field[1];
}

/* A finished checksum changes with the port, one that the device will finish does not, and a program cannot read
 * skb->ip_summed. But the two look different. The device finishes the outer checksum: its field holds the pseudo header's
 * sum. The device finishes the inner one: the kernel finished the outer (local checksum offload, RFC 1071's way) and the
 * inner field holds a pseudo header's sum. Neither: finished, as it came from a wire. */
static __always_inline bool left_to_device(struct __sk_buff *skb, const struct packet *packet)
{
	return holds_pseudo_sum(skb, ETH_HLEN, packet->vxlan_udp, packet->outer_protocol == bpf_htons(ETH_P_IPV6)) &&
	       !holds_pseudo_sum(skb, packet->inner_ip, packet->inner_udp,
	                         packet->inner_protocol == bpf_htons(ETH_P_IPV6));
}

/* For an untagged outer frame. Without VXLAN nothing is written: the ICRC covers RoCE's own ports. */
static __always_inline void set_entropy(struct __sk_buff *skb, const struct packet *packet, __be16 port)
{
	__be16 was = packet->vxlan_source;
	__u16 check;

	if (!packet->vxlan_udp || was == port)
		return;
	/* Zero is no checksum, over IPv4 and, for tunnels, over IPv6 (RFC 6935). */
	if (packet->vxlan_check && !left_to_device(skb, packet)) {
		check = ~fold((__u64)(__u16)~packet->vxlan_check + (__u16)~was + port); /* RFC 1624, 3 */
		if (!check)
			check = 0xffff;
		bpf_skb_store_bytes(skb, packet->vxlan_udp + UDP_CHECK, &check, sizeof(check), 0);
	}
	bpf_skb_store_bytes(skb, packet->vxlan_udp + UDP_SOURCE, &port, sizeof(port), 0);
}

#endif /* QPD_ENTROPY_H */
