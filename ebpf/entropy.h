/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* VXLAN's outer source port, which every later 5-tuple hash sees, gets the QP's entropy; the checksum stays right. */
#ifndef QPD_ENTROPY_H
#define QPD_ENTROPY_H

#include "roce.h"

#define OFFSET_MASK 0x3fff /* of any header that the parser reached: tells the verifier a limit */

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

static __always_inline void *header_at(struct __sk_buff *skb, __u32 offset)
{
	return (void *)(long)skb->data + (offset & OFFSET_MASK);
}

static __always_inline bool ends_within(struct __sk_buff *skb, const void *end)
{
	return end <= (void *)(long)skb->data_end;
}

/* Does a UDP checksum field hold the sum of the pseudo header and nothing else? So it does while the checksum is left to
 * the device (CHECKSUM_PARTIAL), and otherwise once in 65 536 packets. */
static __always_inline bool holds_pseudo_sum(struct __sk_buff *skb, __u32 ip_at, __u32 udp_at, __be16 protocol)
{
	struct ipv6hdr *ipv6 = header_at(skb, ip_at);
	struct iphdr *ipv4 = header_at(skb, ip_at);
	struct udphdr *udp = header_at(skb, udp_at);
	__u64 sum = bpf_htons(IPPROTO_UDP);

	if (!ends_within(skb, udp + 1))
		return false;
	if (protocol == bpf_htons(ETH_P_IPV6)) {
		if (!ends_within(skb, ipv6 + 1))
			return false;
#pragma unroll
		for (int i = 0; i < 4; i++)
			sum += (__u64)ipv6->saddr.in6_u.u6_addr32[i] + ipv6->daddr.in6_u.u6_addr32[i];
	} else {
		if (!ends_within(skb, ipv4 + 1))
			return false;
		sum += (__u64)ipv4->saddr + ipv4->daddr;
	}
	return fold(sum + udp->len) == udp->check;
}

/* A finished checksum changes with the port, one that the device will finish does not, and a program cannot read
 * skb->ip_summed. But the two look different. The device finishes the outer checksum: its field holds the pseudo header's
 * sum. The device finishes the inner one: the kernel finished the outer (local checksum offload) and the inner field holds
 * a pseudo header's sum. Neither: finished, as it came from a wire. */
static __always_inline bool left_to_device(struct __sk_buff *skb, const struct packet *packet)
{
	return holds_pseudo_sum(skb, ETH_HLEN, packet->vxlan_udp, packet->outer_protocol) &&
	       !holds_pseudo_sum(skb, packet->inner_ip, packet->inner_udp, packet->inner_protocol);
}

/* For an untagged outer frame. Without VXLAN nothing is written: the ICRC covers RoCE's own ports.
 *
 * Written in place, which is free; bpf_skb_store_bytes() would cost 30 ns, half of all that steering does. The price is a
 * prologue that the verifier puts before the program: where a packet's buffer is shared with a clone (TCP keeps one), it
 * makes sure that the headers may be written, which copies them only where they are shared as well. That copy is the one
 * thing that can fail, for want of memory, and then the kernel drops the packet. */
static __always_inline void set_entropy(struct __sk_buff *skb, const struct packet *packet, __be16 port)
{
	struct udphdr *udp = header_at(skb, packet->vxlan_udp);
	__be16 was = packet->vxlan_source;
	__u16 check;

	if (!packet->vxlan_udp || was == port || !ends_within(skb, udp + 1))
		return;
	/* Zero is no checksum, over IPv4 and, for tunnels, over IPv6 (RFC 6935). */
	if (packet->vxlan_check && !left_to_device(skb, packet)) {
		check = ~fold((__u64)(__u16)~packet->vxlan_check + (__u16)~was + port); /* RFC 1624, 3 */
		udp->check = check ? check : 0xffff;
	}
	udp->source = port;
}

#endif /* QPD_ENTROPY_H */
