/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* RoCEv2, plain or inside VXLAN: which queue pair is a packet's? */
#ifndef QPD_ROCE_H
#define QPD_ROCE_H

#include "parse.h"

#define PORT_ROCE      4791 /* InfiniBand Architecture 1, annex A17 */
#define PORT_BFD       3784 /* single-hop control packets (RFC 5881, 4); a tagged one is another interface's */
#define PORT_VXLAN     4789 /* RFC 7348, 8 */
#define VXLAN_FLAG_VNI 0x08 /* the I flag: the VNI is valid (RFC 7348, 5) */
#define BTH_VERSION    0x0f /* TVer, of which 0 is the only one there is */

struct vxlan_header {
	__u8 flags;
	__u8 reserved[3];
	__be32 vni; /* 24 bits, then 8 reserved */
};

struct bth {
	__u8 opcode;
	__u8 flags; /* solicited, migration, pad count, version */
	__be16 pkey;
	__be32 dest_qp; /* 8 reserved bits, then 24 */
	__be32 psn;     /* acknowledge request, 7 reserved bits, then 24 */
};

struct packet {
	struct qp_key key;
	struct address destination; /* of the outermost IP header: what the underlay routes by */
	__u32 bytes;                /* of the frame */
	__u32 inner_ip;             /* offset of the innermost IP header */
	__u32 inner_udp;            /* offset of its UDP header */
	__u32 vxlan_udp;            /* offset of the UDP header before VXLAN; 0: no VXLAN */
	__be16 vxlan_source;        /* its source port … */
	__sum16 vxlan_check;        /* … and checksum */
	__be16 outer_protocol;      /* EtherType of the outermost … */
	__be16 inner_protocol;      /* … and of the innermost IP header */
	__u8 tagged;                /* the outer frame has a VLAN tag */
};

/* Where the packet in hand is noted: not on the stack, where the verifier would follow each way through the headers on
 * its own through all that comes after (five times the work, and too much for older kernels). A hook's program is not
 * interrupted by another hook's on its CPU: both run with bottom halves off. */
static __always_inline struct packet *packet_in_hand(struct counters *own)
{
	_Static_assert(sizeof(struct packet) <= sizeof(own->scratch), "SCRATCH_BYTES is too small");
	return (struct packet *)own->scratch;
}

static __always_inline enum verdict parse_udp(struct cursor *cursor, struct udphdr **udp)
{
	*udp = cursor->at;
	if ((void *)(*udp + 1) > cursor->end)
		return VERDICT_TRUNCATED;
	cursor->at = *udp + 1;
	return VERDICT_OPEN;
}

static __always_inline enum verdict parse_vxlan(struct cursor *cursor, void *start, struct packet *packet,
                                                struct udphdr **udp)
{
	struct vxlan_header *vxlan = cursor->at;
	enum verdict verdict;
	__be16 protocol;
	int tags;

	if ((void *)(vxlan + 1) > cursor->end)
		return VERDICT_TRUNCATED;
	if (!(vxlan->flags & VXLAN_FLAG_VNI))
		return VERDICT_NOT_ROCE;
	packet->key.vni = bpf_ntohl(vxlan->vni) >> 8;
	packet->vxlan_udp = (void *)*udp - start;
	packet->vxlan_source = (*udp)->source;
	packet->vxlan_check = (*udp)->check;

	cursor->at = vxlan + 1;
	verdict = parse_ethernet(cursor, &protocol, &tags);
	if (verdict != VERDICT_OPEN)
		return verdict;
	packet->inner_ip = cursor->at - start;
	packet->inner_protocol = protocol;
	verdict = parse_ip(cursor, protocol, &packet->key.dst);
	if (verdict != VERDICT_OPEN)
		return verdict;
	return parse_udp(cursor, udp);
}

/* Reads the headers that lie in the linear part. VERDICT_OPEN: `packet` names a RoCEv2 packet's QP. VERDICT_BFD: it says
 * where the headers of a BFD control packet are. */
static __always_inline enum verdict parse_linear(struct __sk_buff *skb, struct packet *packet)
{
	void *start = (void *)(long)skb->data;
	struct cursor cursor = {.at = start, .end = (void *)(long)skb->data_end};
	enum verdict verdict;
	struct udphdr *udp;
	struct bth *bth;
	__be16 protocol;
	int tags;

	verdict = parse_ethernet(&cursor, &protocol, &tags);
	if (verdict != VERDICT_OPEN)
		return verdict;
	packet->tagged = tags || skb->vlan_present;
	packet->bytes = skb->len;
	packet->vxlan_udp = 0;
	packet->key.vni = 0;
	packet->inner_ip = cursor.at - start;
	packet->outer_protocol = protocol;
	packet->inner_protocol = protocol;
	verdict = parse_ip(&cursor, protocol, &packet->destination);
	if (verdict != VERDICT_OPEN)
		return verdict;
	verdict = parse_udp(&cursor, &udp);
	if (verdict != VERDICT_OPEN)
		return verdict;

	if (udp->dest == bpf_htons(PORT_VXLAN)) {
		verdict = parse_vxlan(&cursor, start, packet, &udp);
		if (verdict != VERDICT_OPEN)
			return verdict;
	} else if (udp->dest == bpf_htons(PORT_BFD)) {
		packet->inner_udp = (void *)udp - start;
		return packet->tagged ? VERDICT_NOT_ROCE : VERDICT_BFD;
	} else {
		copy_address(&packet->key.dst, &packet->destination);
	}
	if (udp->dest != bpf_htons(PORT_ROCE))
		return VERDICT_NOT_ROCE;
	bth = cursor.at;
	if ((void *)(bth + 1) > cursor.end || bpf_ntohs(udp->len) < sizeof(*udp) + sizeof(*bth))
		return VERDICT_TRUNCATED;
	if (bth->flags & BTH_VERSION)
		return VERDICT_NOT_ROCE;
	packet->inner_udp = (void *)udp - start;
	packet->key.dest_qp = bpf_ntohl(bth->dest_qp) & 0xffffff;
	return VERDICT_OPEN;
}

/* A packet whose headers lie in fragments of the buffer is pulled together once and read again. RNICs send no packet for
 * the stack to segment (GSO), and one that is may hold packets of several QPs: left alone. */
static __always_inline enum verdict parse(struct __sk_buff *skb, struct packet *packet)
{
	enum verdict verdict = parse_linear(skb, packet);

	if (verdict == VERDICT_TRUNCATED) {
		__u32 wanted = skb->len < HEADERS_MAX ? skb->len : HEADERS_MAX;

		if (skb->data_end - skb->data < wanted && !bpf_skb_pull_data(skb, wanted))
			verdict = parse_linear(skb, packet);
	}
	if (verdict == VERDICT_OPEN && skb->gso_size)
		return VERDICT_NOT_ROCE;
	return verdict;
}

#endif /* QPD_ROCE_H */
