/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Ethernet, VLAN tags, IPv4 and IPv6: from a frame to the transport header that it carries. */
#ifndef QPD_PARSE_H
#define QPD_PARSE_H

#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/udp.h>

#include "maps.h"

#define VLAN_TAGS_MAX         2 /* 802.1ad outside, 802.1Q inside */
#define EXTENSION_HEADERS_MAX 2
#define IP_FRAGMENT           0x3fff /* more fragments, or an offset (RFC 791, 3.1) */

/* Ethernet 14 + 2 tags 8 + IPv6 40 + UDP 8 + VXLAN 8, the same again without VXLAN, BTH 12, and room for options. */
#define HEADERS_MAX 256

struct cursor {
	void *at;
	void *end;
	__u32 congested; /* bit 0: an IP header was marked CE */
};

struct vlan_tag {
	__be16 tci;
	__be16 protocol;
};

struct extension_header {
	__u8 next;
	__u8 length; /* in units of 8 octets, the first 8 not counted (RFC 8200, 4.3) */
};

struct fragment_header {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 identification;
};

/* Packets are aligned to 2 octets at best, and clang would copy a struct of octets one by one. */
static __always_inline void copy_address(struct address *to, const void *from)
{
	const __u32 *words = from;
	__u32 *copy = (__u32 *)to;

	copy[0] = words[0];
	copy[1] = words[1];
	copy[2] = words[2];
	copy[3] = words[3];
}

static __always_inline void map_address(struct address *to, __be32 ipv4)
{
	__u32 *words = (__u32 *)to;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = ipv4;
}

/* Moves over the Ethernet header and its tags. */
static __always_inline enum verdict parse_ethernet(struct cursor *cursor, __be16 *protocol, int *tags)
{
	struct ethhdr *ethernet = cursor->at;

	if ((void *)(ethernet + 1) > cursor->end)
		return VERDICT_TRUNCATED;
	cursor->at = ethernet + 1;
	*protocol = ethernet->h_proto;
	*tags = 0;
#pragma unroll
	for (int i = 0; i < VLAN_TAGS_MAX; i++) {
		struct vlan_tag *tag = cursor->at;

		if (*protocol != bpf_htons(ETH_P_8021Q) && *protocol != bpf_htons(ETH_P_8021AD))
			break;
		if ((void *)(tag + 1) > cursor->end)
			return VERDICT_TRUNCATED;
		cursor->at = tag + 1;
		*protocol = tag->protocol;
		*tags = i + 1;
	}
	return VERDICT_OPEN;
}

/* Bit 0: the two lowest bits are set, as they are in a traffic class with CE (RFC 3168, 5). No branch, which would double
 * the verifier's work on all that follows. */
static __always_inline __u32 both_bits(__u8 octet)
{
	return octet & octet >> 1;
}

static __always_inline enum verdict parse_ipv4(struct cursor *cursor, struct address *dst)
{
	struct iphdr *ip = cursor->at;

	if ((void *)(ip + 1) > cursor->end)
		return VERDICT_TRUNCATED;
	if (ip->version != 4 || ip->ihl < 5 || ip->protocol != IPPROTO_UDP)
		return VERDICT_NOT_ROCE;
	if (ip->frag_off & bpf_htons(IP_FRAGMENT))
		return VERDICT_FRAGMENT;
	map_address(dst, ip->daddr);
	cursor->congested |= both_bits(ip->tos);
	cursor->at += ip->ihl * 4;
	return VERDICT_OPEN;
}

/* Hop-by-hop and destination options, two at most, may stand before UDP. A routing header is not followed: its packet's
 * destination address is not where it ends. */
static __always_inline enum verdict parse_ipv6(struct cursor *cursor, struct address *dst)
{
	struct ipv6hdr *ip = cursor->at;
	struct fragment_header *fragment;
	__u8 next;

	if ((void *)(ip + 1) > cursor->end)
		return VERDICT_TRUNCATED;
	if (ip->version != 6)
		return VERDICT_NOT_ROCE;
	copy_address(dst, &ip->daddr);
	cursor->congested |= both_bits(ip->flow_lbl[0] >> 4); /* after the version: eight bits of class */
	next = ip->nexthdr;
	cursor->at = ip + 1;
	if (next == IPPROTO_UDP)
		return VERDICT_OPEN;
#pragma unroll
	for (int i = 0; i < EXTENSION_HEADERS_MAX; i++) {
		struct extension_header *extension = cursor->at;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_DSTOPTS)
			break;
		if ((void *)(extension + 1) > cursor->end)
			return VERDICT_TRUNCATED;
		next = extension->next;
		cursor->at += (extension->length + 1) * 8;
	}
	if (next == IPPROTO_UDP)
		return VERDICT_OPEN;
	if (next != IPPROTO_FRAGMENT)
		return VERDICT_NOT_ROCE;
	fragment = cursor->at;
	if ((void *)(fragment + 1) > cursor->end)
		return VERDICT_TRUNCATED;
	return fragment->next == IPPROTO_UDP ? VERDICT_FRAGMENT : VERDICT_NOT_ROCE;
}

/* Moves over the IP header, to the UDP header if it carries UDP whole. */
static __always_inline enum verdict parse_ip(struct cursor *cursor, __be16 protocol, struct address *dst)
{
	if (protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(cursor, dst);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(cursor, dst);
	return VERDICT_NOT_ROCE;
}

#endif /* QPD_PARSE_H */
