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

/* Opcodes (9.2.1): three bits of transport, five of operation. */
#define TRANSPORT_SHIFT     5
#define TRANSPORT_RC        0
#define TRANSPORT_UC        1
#define OPERATIONS          0x1f
#define UD_SEND_ONLY        0x64
#define OPCODE_CNP          0x81 /* annex A17.9 */
#define READ_REQUEST        12
#define READ_RESPONSE_FIRST 13
#define READ_RESPONSE_LAST  15
#define ACKNOWLEDGE         17
#define ATOMIC_ACKNOWLEDGE  18
#define COMPARE_AND_SWAP    19
#define FETCH_AND_ADD       20

/* Answered whether or not they ask for it. */
#define ALWAYS_ANSWERED     0x00181000U

#define ACKNOWLEDGE_REQUEST 0x80000000U /* in the word of the PSN */

struct vxlan_header {
	__u8 flags;
	__u8 reserved[3];
	__be32 vni; /* 24 bits, then 8 reserved */
};

struct bth {
	__u8 opcode;
	__u8 flags; /* solicited, migration, pad count, version */
	__be16 pkey;
	__be32 dest_qp; /* FECN, BECN, 6 reserved bits, then 24 */
	__be32 psn;     /* acknowledge request, 7 reserved bits, then 24 */
};

/* What a packet has brought to light. */
struct findings {
	__u32 missing;
	__u32 out_of_order;
	__u32 duplicates;
	__u32 retransmitted;
	bool back;  /* the sender went back, to … */
	__u32 from; /* … this PSN, */
	bool hole;  /* … which was missing here */
	__u32 gap;  /* the first PSN of those missing; with PSN_KNOWN */
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
	__u8 opcode;                /* of the BTH */
	__u8 marks;                 /* MARK_… */
	__u32 psn;                  /* the BTH's last word: acknowledge request and PSN */
	__u32 before;               /* path id of its queue pair's packet before, */
	__u32 now;                  /* … and of this one, where it is known already */
	struct findings found; /* what is noted of its PSN; in memory, so that the verifier forgets how it came about */
};

/* What the network has to say of congestion: the BTH's bits, and CE in an IP header (RFC 3168, 5). */
#define MARK_BECN 0x01
#define MARK_FECN 0x02
#define MARK_CE   0x04 /* bit 2 */

/* Where the packet in hand is noted: not on the stack, where the verifier would follow each way through the headers on
 * its own through all that comes after (five times the work, and too much for older kernels). A hook's program is not
 * interrupted by another hook's on its CPU: both run with bottom halves off. */
static __always_inline struct packet *packet_in_hand(struct counters *own)
{
	_Static_assert(sizeof(struct packet) <= sizeof(own->scratch), "SCRATCH_BYTES is too small");
	return (struct packet *)own->scratch;
}

/* Will the request be answered for sure? */
static __always_inline bool asks(const struct packet *packet)
{
	return packet->psn & ACKNOWLEDGE_REQUEST || ALWAYS_ANSWERED >> (packet->opcode & OPERATIONS) & 1;
}

/* Transports that acknowledge: RC, RD, XRC. */
#define ACKNOWLEDGED 0x25

/* An answer without data: ACK, NAK, the value that an atomic operation found, CNP. A READ response is none, and all that
 * is not known is taken for data. */
static __always_inline bool only_answers(const struct packet *packet)
{
	__u32 operation = packet->opcode & OPERATIONS;

	if (operation == ACKNOWLEDGE || operation == ATOMIC_ACKNOWLEDGE)
		return ACKNOWLEDGED >> (packet->opcode >> TRANSPORT_SHIFT) & 1;
	return packet->opcode == OPCODE_CNP;
}

static __always_inline struct findings *blank_findings(struct packet *packet)
{
	__builtin_memset(&packet->found, 0, sizeof(packet->found));
	return &packet->found;
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

static __always_inline void load_source(struct __sk_buff *skb, const struct packet *packet, struct address *src)
{
	__be32 ipv4 = 0;

	if (packet->inner_protocol == bpf_htons(ETH_P_IPV6)) {
		bpf_skb_load_bytes(skb, packet->inner_ip + 8, src, sizeof(*src));
		return;
	}
	bpf_skb_load_bytes(skb, packet->inner_ip + 12, &ipv4, sizeof(ipv4));
	map_address(src, ipv4);
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
	__u32 dest_qp;
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
	dest_qp = bpf_ntohl(bth->dest_qp);
	packet->key.dest_qp = dest_qp & 0xffffff;
	packet->marks = dest_qp >> 30 | (cursor.congested & 1) << 2;
	packet->opcode = bth->opcode;
	packet->psn = bpf_ntohl(bth->psn);
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
