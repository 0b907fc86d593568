-- Discrepancies: operators close one with its explanation.

create or replace function surety.close_discrepancy(
    p_id text, p_reason text, p_actor text default session_user
) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with closed as (
        update surety.discrepancies
        set closed_at = surety.time_now(), closed_because = p_reason
        where discrepancies.id = p_id and discrepancies.closed_at is null
        returning discrepancies.id, discrepancies.kind, discrepancies.subject, discrepancies.payment_id
    ),

    audited as (
        select closed.id
        from closed
        left join surety.payments on closed.payment_id = payments.id
        cross join lateral audit.write_entry(
            'operator', 'operator:' || p_actor, 'discrepancy closed', p_reason,
            p_payment_id => closed.payment_id,
            p_merchant_id => payments.merchant_id,
            p_snapshot => jsonb_build_object(
                'discrepancy', closed.id, 'kind', closed.kind, 'subject', closed.subject
            )
        )
    )

    select (select count(*) > 0 from audited)
    from surety.discrepancies cross join surety.await_standbys()
    where discrepancies.id = p_id;
end;

comment on function surety.close_discrepancy(text, text, text) is
'Closes a discrepancy with a reason, and audits it. False if it was closed already, which keeps the first reason; null
if there is none with this id. A closed discrepancy of the same kind and subject is not opened again.';
